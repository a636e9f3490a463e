"""Seconds and memory of a round by the number of clients, where equally many are trained at once.

Time is to grow no faster than the clients (slope 1), and memory by one copy of a client's adapters where updates are
added up one by one, and by a few where the error norms are measured. Each number of clients is measured in a process of
its own.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import Quiet, Remote, emit, environment, log_log_slope, note

CLIENTS = [64, 128, 256, 512, 1024, 2048]
MEMORIES = ("xla_bytes", "temp_bytes", "argument_bytes", "growth_bytes", "peak_memory_bytes")
"""By XLA's count of the program of a round: all, what lies between operations, and what it is given; the most that the
process has held in rounds, beyond what it held before; and the most that it, or the accelerator, has held at all."""


SERIES = {"one_by_one": False, "error_norms": True}
"""Name -> whether the error norms are measured."""


def point(clients: int, error_norms: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One number of clients: a round to warm up, and the timed ones."""
    size = {"clients": clients, "steps": options.steps, "chunk": options.chunk, "error_norms": error_norms}
    with tempfile.TemporaryDirectory() as folder, Remote("scaled:Clients", folder=Path(folder), **size) as remote:
        described = remote.call("describe")
        before = remote.call("peak_memory_bytes")
        remote.call("forget_peak")
        remote.call("round")
        quiet = Quiet(remote)
        seconds = [remote.call("round") for _ in range(options.repeats)]
        return {
            "clients": clients,
            **described,
            "round_s": statistics.median(seconds),
            "round_s_measured": seconds,
            "cpu_share_of_others": quiet.share_of_others(),
            "peak_memory_bytes_before_the_rounds": before,
            "growth_bytes": remote.call("growth_bytes"),
            "peak_memory_bytes": remote.call("peak_memory_bytes"),
        }


def slopes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-log slopes, and bytes of one more client in bytes and in copies of its adapters, by least squares."""
    clients, adapter_bytes = [row["clients"] for row in rows], rows[0]["adapter_bytes"]
    columns = {name: [row[name] for row in rows] for name in ("round_s", *MEMORIES) if name in rows[0]}
    per_client = {
        name: statistics.linear_regression(clients, values).slope
        for name, values in columns.items()
        if name in MEMORIES
    }
    return {
        "log_log_slopes": {name: log_log_slope(clients, values) for name, values in columns.items()},
        "adapter_bytes": adapter_bytes,
        "bytes_per_client": per_client,
        "bytes_per_client_over_adapter_bytes": {name: value / adapter_bytes for name, value in per_client.items()},
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="two numbers or more (%(default)s)")
    parser.add_argument("--chunk", type=int, default=8, help="clients trained at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="local steps (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    if len(set(options.clients)) < 2:
        parser.error(f"--clients must be two different numbers or more, got {options.clients}")
    result = {"benchmark": "client_scaling", "environment": environment(), "steps": options.steps}
    for name, error_norms in SERIES.items():
        result[name] = series(name, error_norms, options)
    emit(result, options.out)


def series(name: str, error_norms: bool, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of clients, and what grows with them."""
    rows = []
    note(f"{name}: clients  compile s  round s   XLA MB  growth MB  process MB")
    for clients in options.clients:
        row = point(clients, error_norms, options)
        rows.append(row)
        xla, growth, peak = (row.get(name, float("nan")) / 1e6 for name in ("xla_bytes", *MEMORIES[-2:]))
        note(f"{clients:7} {row['compile_s']:10.1f} {row['round_s']:8.3f} {xla:8.1f} {growth:10.1f} {peak:11.1f}")
    found = slopes(rows)
    for column, slope in found["log_log_slopes"].items():
        note(f"log-log slope of {column}: {slope:.3f}")
    for column, ratio in found["bytes_per_client_over_adapter_bytes"].items():
        note(f"{column} of one more client: {ratio:.2f} times its adapters")
    return {"rows": rows, **found}


if __name__ == "__main__":
    main()
