"""Numbers of runs side by side: as rows for a page, as text for a terminal."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_lora.io.summary import OF_TASK
from fedjax_lora.report import formats
from fedjax_lora.report.formats import MISSING, Shown
from fedjax_lora.report.runs import Run, differing_keys, load_runs

Row = tuple[str, list[Shown]]  # label, one cell a run

_Summary = Mapping[str, Any]


def summary_rows(runs: Sequence[Run]) -> list[Row]:
    """The keys in which the runs differ, then what came out."""
    summaries = [run.summary for run in runs]
    results = [
        (number.label, [number.of(summary) for summary in summaries])
        for number in [*_headline(summaries), *_worth_showing(_DETAILS, summaries)]
    ]
    present = [
        ("participants a round", [_mean(run, "participants") for run in runs]),
        ("absent weight a round", [_mean(run, "absent_weight") for run in runs]),
    ]
    return [*setting_rows(runs, differing_keys(runs)), *results, *present]


def setting_rows(runs: Sequence[Run], keys: Iterable[str]) -> list[Row]:
    """Options of the configurations, by their dotted keys."""
    return [(key, [formats.setting(run.config.get(key)) for run in runs]) for key in keys]


def summary_lines(summary: _Summary) -> str:
    """Plain text for a terminal: the headline numbers of one summary, one a line, in full where they are rounded."""
    cells = {number.label: number.of(summary) for number in _headline([summary])}
    width = max(map(len, cells))
    return "\n".join(
        f"{label:<{width}}  {cell.text}" + (f" ({cell.exact})" if cell.exact else "") for label, cell in cells.items()
    )


def comparison(run_folders: Iterable[str | Path]) -> str:
    """Plain text for a terminal: the keys in which the runs differ, and their headline numbers.

    A run is a row, or a column where there are fewer runs than numbers.

    Raises:
      ValueError: a folder is not a run's, or has no round in its log.
    """
    runs = load_runs(run_folders)
    summaries = [run.summary for run in runs]
    columns = [("run", [Shown(run.name) for run in runs]), *setting_rows(runs, differing_keys(runs))]
    for number in _headline(summaries):
        columns.append((number.label, [number.of(summary) for summary in summaries]))
    lines = [[label, *(cell.text for cell in cells)] for label, cells in columns]
    if len(runs) + 1 >= len(lines):
        lines = list(zip(*lines, strict=True))
    return text_table(lines)


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Plain text for a terminal: the first line is the head; the first column is flush left, the others flush right."""
    table = Table(box=box.SIMPLE_HEAD)
    for place, label in enumerate(lines[0]):
        table.add_column(Text(label), justify="right" if place else "left")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    # Wide enough never to wrap: a terminal or a pager cuts better than a table does.
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines()) + "\n"


def _always(summary: _Summary) -> bool:
    del summary
    return True


def _has(key: str) -> Callable[[_Summary], bool]:
    """Whether a summary has a value there."""
    return lambda summary: summary.get(key) is not None


def _counts(key: str) -> Callable[[_Summary], bool]:
    """Whether a summary has counted any."""
    return lambda summary: bool(summary.get(key))


class Number(NamedTuple):
    """One number of a summary; a row of it stands where one of the runs is `worth` it."""

    label: str
    key: str
    form: formats.Format
    worth: Callable[[_Summary], bool] = _always

    def of(self, summary: _Summary) -> Shown:
        value = summary.get(self.key)
        return Shown(MISSING) if value is None else self.form(value)


def _headline(summaries: Sequence[_Summary]) -> list[Number]:
    """The numbers that come first, those of the tasks behind the accuracies."""
    names = dict.fromkeys(name for summary in summaries for name in summary if name.startswith(OF_TASK))
    of_task = [Number(formats.metric_name(name), name, formats.number, _has(name)) for name in names]
    return _worth_showing([*_LEARNED, *of_task, *_SPENT], summaries)


def _worth_showing(numbers: Iterable[Number], summaries: Sequence[_Summary]) -> list[Number]:
    return [number for number in numbers if any(map(number.worth, summaries))]


def _mean(run: Run, name: str) -> Shown:
    """A metric of all rounds, on average."""
    values = [line[name] for line in run.metrics if line.get(name) is not None]
    return formats.number(sum(values) / len(values)) if values else Shown(MISSING)


def _accurate(summary: _Summary) -> bool:
    """Whether the task has an accuracy, for all that is known."""
    return summary.get("best_accuracy") is not None or summary.get("final_loss") is None


def _lossy(summary: _Summary) -> bool:
    return not _accurate(summary)


_LEARNED = [
    Number("initial accuracy", "initial_accuracy", formats.accuracy, _accurate),
    Number("final accuracy", "final_accuracy", formats.accuracy, _accurate),
    Number("best accuracy", "best_accuracy", formats.accuracy, _accurate),
    Number("final test loss", "final_loss", formats.number, _lossy),
    Number("personal accuracy", "personal_accuracy", formats.accuracy, _has("personal_accuracy")),
]

_SPENT = [
    Number("rounds", "rounds", formats.count),
    Number("lost rounds", "lost_rounds", formats.count, _counts("lost_rounds")),
    Number("diverged rounds", "diverged_rounds", formats.count, _counts("diverged_rounds")),
    Number("simulated time, s", "total_latency_s", formats.number),
    Number("latency a round, s", "mean_latency_s", formats.number),
    Number("latency budget, s", "latency_budget_s", formats.number, _has("latency_budget_s")),
    Number("mean latency over budget", "latency_over_budget", formats.times, _has("latency_budget_s")),
    Number("queue at the end, s", "final_queue_s", formats.number, _has("latency_budget_s")),
    Number("uplink", "total_uplink_bits", formats.bits),
]

_DETAILS = [
    Number("downlink", "total_downlink_bits", formats.bits),
    Number("taken of the plan", "plan", formats.found, _has("plan")),
    Number("bound, by effect", "bound_effects", formats.found, _has("bound_effects")),
    Number("wall time, s", "wall_s", formats.number),
    Number("of it compiling, s", "compile_s", formats.number),
    Number("goodput", "goodput", formats.number, _has("goodput")),
    Number("seconds, by part", "spent_s", formats.found, _has("spent_s")),
    Number("starts", "starts", formats.count, _has("starts")),
    Number("samples/s", "samples_per_s", formats.number),
    Number("peak memory", "peak_memory_bytes", formats.memory),
    Number("device", "device", formats.found),
    Number("versions", "versions", formats.found),
    Number("partition", "partition_hash", formats.found),
]

NUMBERS = {number.key: number for number in (*_LEARNED, *_SPENT, *_DETAILS)}
"""Field of a summary -> how it is called and written."""
