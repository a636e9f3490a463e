"""Memory of trials side by side: what a process holds at its peak, beside what `trials_at_once: auto` foresees."""

import argparse
import subprocess
import sys
from pathlib import Path

import common

PROGRAM = """
import resource, sys
import fedjax_lora as fl
from fedjax_lora.config.groups import grouped
from fedjax_lora.sim.trials import Lanes, lanes_bytes
lanes, clients = int(sys.argv[1]), sys.argv[2]
given = ["rounds=2", "engine.eval_every=2", "lora.max_rank=64", "lora.targets=[query, value, up, down]",
         "local.steps=2", f"clients.count={clients}", f"engine.trials_at_once={lanes}"]
configs = [fl.load_config(None, [*given, f"seed={seed}"]) for seed in range(lanes)]
(group,), _ = grouped(configs)
side_by_side = Lanes(group.simulation, lanes)
for states, _ in side_by_side.segments(group.trials, side_by_side.init(group.trials), 2):
    pass
foreseen = lanes_bytes(group.simulation.needs, group.simulation.layout, lanes)
print(foreseen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Measure each number of trials in a process of its own, and fit lines through both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 8, 16, 24])
    options = parser.parse_args()
    rows = []
    for lanes in options.lanes:
        command = [sys.executable, "-c", PROGRAM, str(lanes), str(options.clients)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        foreseen, peak = (float(number) for number in done.stdout.split()[-2:])
        rows.append({"trials_at_once": lanes, "foreseen_bytes": foreseen, "peak_bytes": peak})
        common.note(f"{lanes} trials: foreseen {foreseen / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    first, last = rows[0], rows[-1]
    more = last["trials_at_once"] - first["trials_at_once"]
    slopes = {f"{name}_of_a_trial": (last[name] - first[name]) / more for name in ("foreseen_bytes", "peak_bytes")}
    common.emit({"clients": options.clients, "rows": rows, **slopes, "environment": common.environment()}, options.out)


if __name__ == "__main__":
    main()
