"""Writes the tables of docs/performance.md from the JSON of the benchmarks: each stands between two marker lines.

Run as `python benchmarks/performance_page.py`. A table is made of files in `benchmarks/results/`, and the last one of
what `make bench` has left in `benchmarks/results/short/`; one whose files are absent is empty. What stands outside of
the markers is not touched.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import short_rows
from table import Row, percent, seconds, table, times

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def real_sentences(results: Path) -> str:
    """The round on a text, beside the loop."""
    rows = []
    kinds = ("text", "joined")
    for name in (f"round_throughput_{kind}{machine}" for machine in ("", "_amx") for kind in kinds):
        held = read(results, name)
        for dtype, found in held.get("results", {}).items():
            work = held["workload"]
            what = "SST-2" if work["joined"] == 1 else f"{work['joined']} of SST-2 joined"
            tokens = found["round"]["tokens"] / found["round"]["samples"]
            rates = [found[side]["samples_per_s"]["median"] for side in ("engine", "peer")]
            shares = map(percent, matrix_shares(found))
            row = [held["environment"]["cpu"], dtype, f"{what}, at most {work['length']}", f"{tokens:.0f}"]
            row += [f"{rate:.0f}" for rate in rates]
            rows.append([*row, times(found["ratio"]), *shares, seconds(found["engine"]["compile_s"])])
    head = ["processor", "products in", "sentences", "real tokens", "samples/s", "the loop"]
    return table([*head, "ratio, median and extremes", "of the matrix rate", "the loop's", "compiling"], rows)


FIXED = {
    "MiniLM": ("round_throughput", *(f"round_throughput_{name}" for name in ("zen4", "zen3", "xeon", "amx"))),
    "RoBERTa-base's shape": ("round_throughput_roberta",),
    "ViT-B/16's shape": ("image_throughput",),
}
"""Model -> files of its rounds at a fixed length."""


def fixed_length(results: Path) -> str:
    """The round at a fixed length by model, processor and dtype."""
    rows = []
    for model, name in ((model, name) for model, names in FIXED.items() for name in names):
        held = read(results, name)
        for dtype, found in held.get("results", {}).items():
            own, peer = map(percent, matrix_shares(found))
            size = f"{held['workload']['clients']} clients, {len(found['engine']['round_s'])} pairs"
            what = f"{model}, {held['workload']['length']}"
            rate = f"{found['engine']['samples_per_s']['median']:.3g}"
            rows.append([held["environment"]["cpu"], what, dtype, size, rate, times(found["ratio"]), own, peer])
    head = ["processor", "model, positions", "products in", "of", "samples/s", "ratio, median and extremes"]
    return table([*head, "of the matrix rate", "the loop's"], rows)


def matrix_shares(found: dict[str, Any]) -> list[float]:
    """GFLOP/s of engine and peer over the higher of the two measured matrix rates."""
    best = max(found["matmul_gflops"].values())
    return [found[side]["gflops"] / best for side in ("engine", "peer")]


def small_clients(results: Path) -> str:
    """A round of clients that do little, beside other engines."""
    rows = []
    for held in read(results, "client_overhead").get("results", []):
        peers = (held["peers"][name] for name in ("flower", "pfl"))
        told = [f"{seconds(peer['median_round_s'])}, {peer['ratio']:.1f}×" for peer in peers]
        rows.append([f"{held['clients']:,}", seconds(held["engine"]["median_round_s"]), *told])
    return table(["clients", "a round", "Flower", "pfl-research"], rows)


def flower(results: Path) -> str:
    """A round on sentences beside Flower's engine."""
    held = read(results, "flower_text")
    if not held:
        return ""
    medians = (statistics.median(held[side]["round_s"]) for side in ("engine", "flower"))
    size = f"{held['workload']['clients']}"
    row = [held["environment"]["cpu"], size, *map(seconds, medians), f"{held['ratio']:.2f}×"]
    return table(["processor", "clients", "a round", "Flower", "ratio"], [row])


def compiling(results: Path) -> str:
    """Tracing and compiling by what makes a program larger."""
    rows: list[Row] = []
    for name, by in read(results, "compile_time").get("by", {}).items():
        for row in by["rows"]:
            lines = f"{row['compiled_lines']:,.0f}"
            rows.append([f"{row[name]} {name}", seconds(row["lower_s"]), seconds(row["compile_s"]), lines])
    return table(["program of", "tracing", "compiling", "lines after XLA"], rows)


def memory(results: Path) -> str:
    """Slopes of time and memory in the number of clients."""
    held = read(results, "client_scaling")
    if not held:
        return ""
    series = {"one_by_one": "one by one", "error_norms": "with error norms"}
    kinds = {
        "xla_bytes": "memory of one more client, by XLA's count",
        "growth_bytes": "memory of one more client, growth in rounds",
        "peak_memory_bytes": "memory of one more client, the whole process",
    }
    rows = [["time", *(f"clients to the power {held[name]['log_log_slopes']['round_s']:.2f}" for name in series)]]
    for kind, what in kinds.items():
        copies = [held[name]["bytes_per_client_over_adapter_bytes"][kind] for name in series]
        rows.append([what, *(f"{number:.2f} times its adapters" for number in copies)])
    return table(["what grows", *series.values()], rows)


def sparsifiers(results: Path) -> str:
    """Every sparsifier at the size that is checked, what is asked, and the picture of `sparsifier_figure.py`."""
    held = read(results, "sparsifier_throughput")
    if not held:
        return ""
    parts = [short_rows.sparsifier_table(held), short_rows.check_table(held)]
    if "energy" in held:
        parts.append("![Throughput against kept energy at equal bits](sparsifier_throughput.svg)\n")
    return "\n".join(part for part in parts if part)


def solvers(results: Path) -> str:
    """Allocation, TSFA and scheduling by size, and what is asked."""
    held = read(results, "solver_throughput")
    rows = table(["solver", "clients or devices", "a call", "CVXPY's over it"], short_rows.solver_rows(held))
    return f"{rows}\n{short_rows.check_table(held)}" if held else ""


def sweeps(results: Path) -> str:
    """Trials a second by trials at once."""
    held = read(results, "sweep_throughput")
    return table(["trials of", "at once", "trials/s", "ratio", "compiling"], short_rows.sweep_rows(held))


def accelerators(results: Path) -> str:
    """Rounds by device and shape."""
    rows = []
    for path in sorted(results.glob("accelerator*.json")):
        parts = json.loads(path.read_text())["parts"]
        device = parts["ceilings"]["device"]
        for name, part in parts.items():
            if "dtype" in part:
                rows += [[device, name, *_round(part, row, parts["ceilings"])] for row in part["rows"]]
        for name, rate in parts.get("peer", {}).items():
            if name.endswith(", samples/s"):
                how = f"minilm by the loop, {name.removesuffix(', samples/s')}"
                rows.append([device, how, "–", "–", "–", f"{rate:,.0f}", "–", "–", "–"])
    head = ["device", "round of", "activations", "layers", "clients at once", "samples/s", "TFLOP/s"]
    return table([*head, "of the matrix rate", "frozen model alone"], rows)


def _round(part: dict[str, Any], row: dict[str, Any], ceilings: dict[str, Any]) -> list[str]:
    """Columns of one row of a part; files made before there were options have none."""
    options = row.get("options", {})
    low, best = part["dtype"] == "bfloat16", max(part["rows"], key=lambda row: row["samples_per_s"])
    alone = row is best and "frozen_model_alone_samples_per_s" in part
    return [
        options.get("activation_dtype", "float32"),
        "one by one" if options.get("unroll") else "a loop",
        f"{row['client_chunk']}",
        f"{row['samples_per_s']:,.0f}",
        f"{row['tflops']:.0f}",
        percent(row["tflops"] / ceilings["bfloat16, TFLOP/s"]) if low else "–",
        f"{part['frozen_model_alone_samples_per_s'] / row['samples_per_s']:.2f}×" if alone else "–",
    ]


def short(results: Path) -> str:
    """What `make bench` has found last."""
    held = {path.stem: json.loads(path.read_text()) for path in sorted((results / "short").glob("*.json"))}
    return short_rows.short_table(held) if held else ""


BLOCKS: dict[str, Callable[[Path], str]] = {
    "real sentences": real_sentences,
    "fixed length": fixed_length,
    "small clients": small_clients,
    "flower": flower,
    "compiling": compiling,
    "memory": memory,
    "sparsifiers": sparsifiers,
    "solvers": solvers,
    "sweeps": sweeps,
    "accelerators": accelerators,
    "short form": short,
}
"""Name in the marker -> what stands after it."""


def read(results: Path, name: str) -> dict[str, Any]:
    """A benchmark's JSON; nothing where it is absent."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def rewritten(page: str, results: Path) -> str:
    """The page with what the results say between its markers.

    Raises:
      ValueError: a table has no place in the page, or more than one.
    """
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: from JSON -->\n", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            counts = f"{page.count(begin)} and {page.count(end)}"
            raise ValueError(f"the page must have the markers of {name!r} once, got {counts}")
        before, after = page.split(begin)
        found = block(results)
        page = before + begin + (f"\n{found}\n" if found else "") + end + after.split(end)[1]
    return page


def main() -> None:
    """Rewrite the page in place."""
    PAGE.write_text(rewritten(PAGE.read_text(), RESULTS))


if __name__ == "__main__":
    main()
