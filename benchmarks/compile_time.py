"""How long a run's program takes to trace, to lower and to compile, by what makes the run larger.

Layers are scanned, rounds are a loop and trials are mapped, so that none of them makes the program longer: the slopes
are to be near 0. Each point is measured in processes of its own, which find no compiled program.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import Remote, emit, environment, log_log_slope, note

FIXED = {"layers": 2, "rounds": 10, "trials": 0}
"""What a point has of those that are not varied; 0 trials are a run that is no trial."""

SIZES = {"layers": [1, 2, 4, 8, 16], "rounds": [1, 10, 100], "trials": [1, 4, 16]}
FIELDS = ("lower_s", "compile_s", "stablehlo_lines", "compiled_lines")


def point(size: dict[str, int], repeats: int) -> dict[str, Any]:
    """One size: medians, and every measured number of seconds."""
    found = []
    for _ in range(repeats):
        with (
            tempfile.TemporaryDirectory() as folder,
            Remote("scaled:Compiled", folder=Path(folder), **size) as remote,
        ):
            found.append(remote.call("measure"))
    row = {field: statistics.median(run[field] for run in found) for field in FIELDS}
    measured = {f"{field}_measured": [run[field] for run in found] for field in FIELDS[:2]}
    return {**size, "device": found[0]["device"], **row, **measured}


def measure(name: str, sizes: list[int], repeats: int) -> dict[str, Any]:
    """All sizes of one kind, and the log-log slope of each field over them."""
    rows = []
    note(f"{name:>7} " + " ".join(f"{field:>15}" for field in FIELDS))
    for size in sizes:
        row = point(FIXED | {name: size}, repeats)
        rows.append(row)
        note(f"{size:7} " + " ".join(f"{row[field]:15.2f}" for field in FIELDS))
    if len(set(sizes)) < 2:
        return {"rows": rows}
    slopes = {field: log_log_slope(sizes, [row[field] for row in rows]) for field in FIELDS}
    note("  slope " + " ".join(f"{slope:15.3f}" for slope in slopes.values()))
    return {"rows": rows, "log_log_slopes": slopes}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, sizes in SIZES.items():
        parser.add_argument(
            f"--{name}", type=int, nargs="*", default=sizes, help="(%(default)s); nothing leaves it out"
        )
    parser.add_argument("--repeats", type=int, default=3, help="processes of each point (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "compile_time", "environment": environment(), "fixed": FIXED}
    result["by"] = {name: measure(name, sizes, options.repeats) for name in SIZES if (sizes := getattr(options, name))}
    emit(result, options.out)


if __name__ == "__main__":
    main()
