"""Memory and time of a round by the size of the population of which a cohort is drawn.

Run as `python benchmarks/population.py`: the digits preset, a cohort of 256 of 1,000 and of 1,000,000 clients that draw
their examples from their ids. Each population runs in a process of its own, whose peak memory is a result; they take
turns, so that both see the same load.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import Quiet, Remote, emit, environment, note, spread

LIMIT_BYTES = 3_000_000_000
MOST_RATIO = 1.1
"""Of the time of a round of the largest population over one of the smallest."""

POPULATIONS, QUICK_POPULATIONS = [1_000, 1_000_000], [40, 4_000]


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--populations", type=int, nargs="+", help="clients in all, in increasing order")
    parser.add_argument("--cohort", type=int, default=256, help="clients of a round (%(default)s)")
    parser.add_argument("--examples", type=int, default=32, help="that each client draws (%(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="of each population, after one (%(default)s)")
    parser.add_argument(
        "--turn", type=int, default=5, help="rounds of a turn, at whose end is an evaluation (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a toy size")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    if options.quick:
        options.cohort, options.examples, options.rounds, options.turn = 4, 6, 2, 1
    populations = options.populations or (QUICK_POPULATIONS if options.quick else POPULATIONS)
    result = {"benchmark": "population", "environment": environment()}
    result |= measured(populations, options)
    emit(result, options.out)


def measured(populations: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """All populations in turns, and the largest beside the smallest."""
    shape = {"cohort": options.cohort, "examples": options.examples, "turn": options.turn, "quick": options.quick}
    remotes = {}
    for clients in populations:
        note(f"building {clients:,} clients")
        remotes[clients] = Remote("populated:Populated", clients=clients, **shape)
        remotes[clients].call("rounds", 1)
    seconds: dict[int, list[float]] = {clients: [] for clients in populations}
    quiet = Quiet(*remotes.values())
    for turn in range(options.rounds // options.turn):
        note(f"rounds {turn * options.turn + 1} to {(turn + 1) * options.turn}")
        for clients, remote in remotes.items():
            seconds[clients].append(remote.call("rounds", options.turn) / options.turn)
    others = quiet.share_of_others()
    rows = [{**remotes[clients].call("describe"), "round_s": spread(seconds[clients])} for clients in populations]
    for remote in remotes.values():
        remote.__exit__()
    ratio = statistics.median(b / a for a, b in zip(seconds[populations[0]], seconds[populations[-1]], strict=True))
    peak = max(row["peak_memory_bytes"] for row in rows)
    return {
        "workload": shape | {"rounds": options.rounds},
        "populations": rows,
        "cpu_share_of_others": others,
        "round_s_of_largest_over_smallest": ratio,
        "peak_memory_bytes": peak,
        "holds": {"memory": peak < LIMIT_BYTES, "time": ratio < MOST_RATIO},
    }


if __name__ == "__main__":
    main()
