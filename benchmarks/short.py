"""A short form of every benchmark of speed, one after the other, under 20 minutes on two cores: `make bench`.

The JSON lies in `benchmarks/results/short/`, beside the results of the full forms, which stay; then the tables of
docs/performance.md are written from both. What fails, or finds no time, is named at the end, and keeps no file.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import performance_page
from common import note

COMMANDS = {
    "sparsifier_throughput": "--quick",
    "solver_throughput": "--clients 16 256 --devices 32 --cvxpy-clients 4 16 --cvxpy-devices 3 --cases 4 "
    "--gap-cases 20 --seconds 0.5",
    "sweep_throughput": "--at-once 2 8 --network-rounds 50 --repeats 3",
    "round_throughput": "--clients 4 --repeats 3 --dtypes float32 --skip-compile --skip-sweep",
    "many_clients": "--clients 32",
    "client_overhead": "--clients 10 100 --skip-compile",
    "client_scaling": "--clients 64 192",
    "compile_time": "--layers 1 4 --rounds --trials --repeats 1",
    "network_sweep": "--clients 64 --rounds 200 --powers 2",
    "sweep_memory": "--clients 50 --lanes 1 4",
    "accelerator": "--quick --budget 200 --limit 60",
}
"""Benchmark -> its options. Those left out measure accuracy, not speed, and take hours or sentences of one's own."""

BUDGET_S, LIMIT_S = 1170.0, 240.0
"""Of all together, and of one."""


def run(name: str, options: str, folder: Path, limit_s: float) -> str | None:
    """Measure one; the reason where it fails."""
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), *options.split(), "--out", str(out)]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        out.unlink(missing_ok=True)
        return f"took more than {limit_s:.0f} s"
    if done.returncode:
        out.unlink(missing_ok=True)
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None


def main() -> None:
    """Measure all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="of them")
    options = parser.parse_args()
    folder, end, wrong = performance_page.RESULTS / "short", time.perf_counter() + BUDGET_S, {}
    folder.mkdir(exist_ok=True)
    for name in options.only:
        started = time.perf_counter()
        left = end - started
        reason = run(name, COMMANDS[name], folder, min(LIMIT_S, left)) if left > 0 else "found no time"
        note(f"{name}: {reason or 'done'}, {time.perf_counter() - started:.0f} s")
        if reason:
            wrong[name] = reason
    performance_page.main()
    if wrong:
        sys.exit("; ".join(f"{name}: {reason}" for name, reason in wrong.items()))


if __name__ == "__main__":
    main()
