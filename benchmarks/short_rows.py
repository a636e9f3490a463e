"""Rows of the performance page that the full and the short form of a benchmark share."""

from collections.abc import Callable
from typing import Any

from table import Row, percent, seconds, table, three


def sparsifier_table(held: dict[str, Any]) -> str:
    """Every sparsifier, the choices alone and PyTorch at rank 16 and width 768, by clients."""
    rows = []
    for row in held["rows"]:
        if (row["rank"], row["width"]) == (16, 768):
            for name, each in row["methods"].items():
                rate, share = each["gb_per_s"]["median"], each["share_of_copy"]
                rows.append([f"{row['clients']:,}", f"`{name}`", *_call(each), three(rate), percent(share)])
            for name, each in row["choosing"].items():
                rows.append([f"{row['clients']:,}", f"choosing by {name}", *_call(each), "", ""])
            for name, each in row["torch"].items():
                rows.append([f"{row['clients']:,}", f"PyTorch, {name}", *_call(each), "", ""])
    return table(["clients", "what", "a client", "clients/s", "GB/s", "of copying"], rows)


def _call(each: dict[str, Any]) -> list[str]:
    return [seconds(1 / each["clients_per_s"]), f"{each['clients_per_s']:,.0f}"]


def check_table(held: dict[str, Any]) -> str:
    """What is asked, what was found, and whether it holds."""
    rows = []
    for name, check in held.get("checks", {}).items():
        values = check.get("by_clients", {"": check.get("value")})
        found = ", ".join(f"{value:.3g}{f' ({of} clients)' if of else ''}" for of, value in values.items())
        rows.append([name, check["asked"], found, "yes" if check["holds"] else "no"])
    return table(["asked", "bound", "found", "holds"], rows)


def solver_rows(held: dict[str, Any]) -> list[Row]:
    """Each solver by size; the ratio where CVXPY solved as large a problem."""
    rows: list[Row] = []
    for part, kinds in {"allocation": [None], "tsfa": ["round", "solve"], "scheduling": None}.items():
        of = held.get(part, {})
        for size in dict.fromkeys([*of.get("sizes", {}), *of.get("beside_cvxpy", {})]):
            own, beside = of["sizes"].get(size, {}), of["beside_cvxpy"].get(size, {})
            for kind in kinds or dict.fromkeys([*own, *beside]):
                timed = own if kind is None else own.get(kind, {})
                peer = beside.get(kind, {}) if part == "scheduling" else beside if kind != "round" else {}
                call = timed.get("call_s") or peer.get("ours", {}).get("call_s")
                if call:
                    ratio = f"{peer['ratio']:,.0f}×" if peer else "–"
                    rows.append([f"{part}, {kind}" if kind else part, size, seconds(call["median"]), ratio])
    return rows


def sweep_rows(held: dict[str, Any]) -> list[Row]:
    """Trials a second by what is swept and trials at once."""
    return [
        [
            name,
            str(row["at_once"]),
            three(row["trials_per_s"]["median"]),
            f"{row['ratio']:.2f}×",
            seconds(row["compile_s"]),
        ]
        for name, part in held.get("parts", {}).items()
        for row in part["rows"]
    ]


def _round(held: dict[str, Any]) -> list[Row]:
    found = []
    for dtype, result in held["results"].items():
        rate = three(result["engine"]["samples_per_s"]["median"])
        ratio = f", {result['ratio']['median']:.2f}× the loop" if "ratio" in result else ""
        found.append([f"{held['workload']['clients']} clients of MiniLM, {dtype}", f"{rate} samples/s{ratio}"])
    return found


def _many(held: dict[str, Any]) -> list[Row]:
    found, clients = held["results"], held["workload"]["clients"]
    memory = f"{found['peak_memory_bytes'] / 1e9:.2f} GB at the most"
    return [[f"{clients} clients of MiniLM, SOFT over a cell", f"{three(found['samples_per_s'])} samples/s, {memory}"]]


def _overhead(held: dict[str, Any]) -> list[Row]:
    return [
        [f"{row['clients']} small clients", f"{seconds(row['engine']['median_round_s'])} a round"]
        for row in held["results"]
    ]


def _scaling(held: dict[str, Any]) -> list[Row]:
    one_by_one = held["one_by_one"]
    slope = one_by_one["log_log_slopes"]["round_s"]
    copies = one_by_one["bytes_per_client_over_adapter_bytes"]["growth_bytes"]
    return [["one more client", f"time as clients to the power {slope:.2f}, {copies:.1f} times its adapters in memory"]]


def _compile(held: dict[str, Any]) -> list[Row]:
    return [
        [f"compiling, {row[name]} {name}", f"{seconds(row['compile_s'])} after {seconds(row['lower_s'])} of tracing"]
        for name, by in held["by"].items()
        for row in by["rows"]
    ]


def _sparsify(held: dict[str, Any]) -> list[Row]:
    (row, *_) = held["rows"]
    size = f"{row['clients']} clients, rank {row['rank']}, width {row['width']}"
    return [
        [f"`{name}`, {size}", f"{three(each['gb_per_s']['median'])} GB/s, {percent(each['share_of_copy'])} of copying"]
        for name, each in row["methods"].items()
    ]


def _solve(held: dict[str, Any]) -> list[Row]:
    rows = solver_rows(held)
    return [
        [f"{what}, {size}", call + (f", CVXPY {ratio}" if ratio != "–" else "")] for what, size, call, ratio in rows
    ]


def _sweep(held: dict[str, Any]) -> list[Row]:
    return [[f"trials of {name}, {number} at once", f"{rate} a second"] for name, number, rate, *_ in sweep_rows(held)]


def _network(held: dict[str, Any]) -> list[Row]:
    return [
        [f"network alone, {name}, {held['clients']} clients", f"{three(part['settings_a_minute'])} settings a minute"]
        for name, part in held.items()
        if isinstance(part, dict) and "settings_a_minute" in part
    ]


def _memory(held: dict[str, Any]) -> list[Row]:
    megabytes = held["peak_bytes_of_a_trial"] / 1e6, held["foreseen_bytes_of_a_trial"] / 1e6
    return [[f"one more trial of {held['clients']} clients", "{:.0f} MB, {:.0f} foreseen".format(*megabytes)]]


def _accelerator(held: dict[str, Any]) -> list[Row]:
    return [
        [
            f"parts of an accelerator, {name}",
            "ends with an error" if "error" in part else f"runs, {seconds(part['part_s'])}",
        ]
        for name, part in held["parts"].items()
    ]


SHORT: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "round_throughput": _round,
    "many_clients": _many,
    "client_overhead": _overhead,
    "client_scaling": _scaling,
    "compile_time": _compile,
    "sparsifier_throughput": _sparsify,
    "solver_throughput": _solve,
    "sweep_throughput": _sweep,
    "network_sweep": _network,
    "sweep_memory": _memory,
    "accelerator": _accelerator,
}
"""File -> what and found, of each number that is shown."""


def short_table(held: dict[str, dict[str, Any]]) -> str:
    """All that is shown of the short form, after the machine that it was measured on."""
    machines = dict.fromkeys(
        f"{of['environment']['cpu']}, {of['environment']['cores']} cores, commit `{of['environment']['git_commit']}`"
        for of in held.values()
    )
    rows = [[f"`{name}.py`", *row] for name, show in SHORT.items() if name in held for row in show(held[name])]
    return f"{'; '.join(machines)}.\n\n" + table(["benchmark", "what", "found"], rows)
