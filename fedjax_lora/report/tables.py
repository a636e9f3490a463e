"""Numbers of runs side by side: as rows for a page, as text for a terminal."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_lora.report.runs import Run, differing_keys, load_runs

MISSING = "–"
"""What stands for a value that was not measured."""

_Cell = Callable[[Mapping[str, Any]], str]  # of a summary


def summary_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows `(label, one cell a run)`: the keys in which the runs differ, then what came out."""
    settings = [(key, [_cell(run.config.get(key)) for run in runs]) for key in differing_keys(runs)]
    columns = _measured(_HEADLINE | _DETAILS, [run.summary for run in runs])
    results = [(label, [cell(run.summary) for run in runs]) for label, cell in columns.items()]
    return [*settings, *results, ("participants a round", [_participants(run) for run in runs])]


def summary_lines(summary: Mapping[str, Any]) -> str:
    """Plain text for a terminal: the headline numbers of one summary, one a line."""
    headline = _measured(_HEADLINE, [summary])
    width = max(map(len, headline))
    return "\n".join(f"{label:<{width}}  {cell(summary)}" for label, cell in headline.items())


def comparison(run_folders: Iterable[str | Path]) -> str:
    """Plain text for a terminal: the keys in which the runs differ, and their headline numbers.

    A run is a row, or a column where there are fewer runs than numbers.

    Raises:
      ValueError: a folder is not a run's, or has no round in its log.
    """
    runs = load_runs(run_folders)
    keys, headline = differing_keys(runs), _measured(_HEADLINE, [run.summary for run in runs])
    rows = [["run", *keys, *headline]]
    for run in runs:
        settings = [_cell(run.config.get(key)) for key in keys]
        rows.append([run.name, *settings, *(cell(run.summary) for cell in headline.values())])
    if len(rows) < len(rows[0]):
        rows = list(zip(*rows, strict=True))
    table = Table(box=box.SIMPLE_HEAD)
    for number, label in enumerate(rows[0]):
        table.add_column(Text(label), justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    # Wide enough never to wrap: a terminal or a pager cuts better than a table does.
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines()) + "\n"


def _measured(columns: Mapping[str, _Cell], summaries: Sequence[Mapping[str, Any]]) -> dict[str, _Cell]:
    """The columns without those of `_OPTIONAL` that none of the runs has."""
    absent = {label for label, key in _OPTIONAL.items() if all(summary.get(key) is None for summary in summaries)}
    return {label: cell for label, cell in columns.items() if label not in absent}


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _formatted(key: str, form: str) -> _Cell:
    """A number of the summary, formatted."""

    def cell(summary: Mapping[str, Any]) -> str:
        value = summary.get(key)
        return MISSING if value is None else format(value, form)

    return cell


def _text(key: str) -> _Cell:
    return lambda summary: _cell(summary.get(key))


def _participants(run: Run) -> str:
    """Mean over the rounds."""
    counts = [line["participants"] for line in run.metrics]
    return f"{sum(counts) / len(counts):.4g}"


_OPTIONAL = {
    "personal accuracy": "personal_accuracy",
    "taken of the plan": "plan",
    "bound, by effect": "bound_effects",
}

_HEADLINE: dict[str, _Cell] = {
    "initial accuracy": _formatted("initial_accuracy", ".4f"),
    "final accuracy": _formatted("final_accuracy", ".4f"),
    "best accuracy": _formatted("best_accuracy", ".4f"),
    "personal accuracy": _formatted("personal_accuracy", ".4f"),
    "rounds": _formatted("rounds", "d"),
    "simulated time, s": _formatted("total_latency_s", ".6g"),
    "latency a round, s": _formatted("mean_latency_s", ".4g"),
    "uplink, bits": _formatted("total_uplink_bits", ",d"),
}

_DETAILS: dict[str, _Cell] = {
    "queue at the end, s": _formatted("final_queue_s", ".4g"),
    "taken of the plan": _text("plan"),
    "bound, by effect": _text("bound_effects"),
    "downlink, bits": _formatted("total_downlink_bits", ",d"),
    "wall time, s": _formatted("wall_s", ".4g"),
    "of it compiling, s": _formatted("compile_s", ".4g"),
    "samples/s": _formatted("samples_per_s", ".4g"),
    "peak memory, bytes": _formatted("peak_memory_bytes", ",d"),
    "device": _text("device"),
    "versions": _text("versions"),
    "seed": _text("seed"),
    "partition": _text("partition_hash"),
}
