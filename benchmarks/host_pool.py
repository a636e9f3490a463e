"""Memory and time of a round with the training pool on the device, and on the host.

Run as `python benchmarks/host_pool.py`: a cohort of 16 of 100,000 clients, each of 32 examples of a synthetic pool of
2 GB. Each place of the pool has a process of its own, whose memory is a result; they take turns, so that both see the
same load.
"""

import argparse
import statistics
from pathlib import Path

from common import Quiet, Remote, emit, environment, note, spread

EXAMPLE_BYTES = 4096
PLACES = ("device", "host")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool-mb", type=int, default=2000, help="of images (%(default)s)")
    parser.add_argument("--clients", type=int, default=100_000, help="in all (%(default)s)")
    parser.add_argument("--cohort", type=int, default=16, help="clients of a round (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of each place, after one (%(default)s)")
    parser.add_argument("--turn", type=int, default=2, help="rounds of a segment; a turn has two (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a toy size")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    if options.quick:
        options.pool_mb, options.clients, options.cohort, options.turns, options.turn = 8, 100, 2, 1, 1
    examples = options.pool_mb * 10**6 // EXAMPLE_BYTES
    shape = {"examples": examples, "clients": options.clients, "cohort": options.cohort, "turn": options.turn}
    remotes = {}
    for place in PLACES:
        note(f"building with the pool on the {place}")
        remotes[place] = Remote("pooled:Pooled", data=place, **shape)
        remotes[place].call("rounds", 2 * options.turn)
    seconds: dict[str, list[float]] = {place: [] for place in PLACES}
    quiet = Quiet(*remotes.values())
    for turn in range(options.turns):
        note(f"turn {turn + 1} of {options.turns}")
        for place, remote in remotes.items():
            seconds[place].append(remote.call("rounds", 2 * options.turn) / (2 * options.turn))
    others = quiet.share_of_others()
    rows = {place: {**remotes[place].call("describe"), "round_s": spread(seconds[place])} for place in PLACES}
    for remote in remotes.values():
        remote.__exit__()
    result = {
        "benchmark": "host_pool",
        "environment": environment(),
        "workload": shape | {"turns": options.turns, "quick": options.quick},
        "pool_bytes": examples * (EXAMPLE_BYTES + 4),
        "places": rows,
        "cpu_share_of_others": others,
        "round_s_of_host_over_device": statistics.median(
            b / a for a, b in zip(seconds["device"], seconds["host"], strict=True)
        ),
    }
    emit(result, options.out)


if __name__ == "__main__":
    main()
