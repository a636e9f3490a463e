"""The table of a sweep: one row a cell, sorted, and what is to be said of the trials that did not end well."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fedjax_lora.config.sweeps import Setting
from fedjax_lora.io.sweep import COLUMNS, columns
from fedjax_lora.report import formats
from fedjax_lora.report.axes import key_axis
from fedjax_lora.report.cells import SEED, Cell, Reached, Results, Spread
from fedjax_lora.report.formats import MISSING, Shown
from fedjax_lora.report.tables import NUMBERS

_HIGH_IS_GOOD = {"final_accuracy", "best_accuracy", "personal_accuracy", "initial_accuracy"}
_ALWAYS = ("total_uplink_bits", "total_latency_s", "mean_latency_s")
_WHERE_MEASURED = ("latency_over_budget",)

NOT_REACHED = "not reached"
PLURALS = {"diverged": "diverged", "stopped": "stopped early", "refused": "refused"}
"""Status of the trials that did not end -> what is said of them, in this order."""


class Column(NamedTuple):
    """A column of the table: its head, and what it says of a cell."""

    head: str
    of: Callable[[Cell], Shown]


class SweepTable(NamedTuple):
    """heads: of the columns. cells: one a row. rows: what the columns say of each. keys: how many columns are keys."""

    heads: list[str]
    cells: list[Cell]
    rows: list[list[Shown]]
    keys: int


def check_sort(sort: str | None, settings: Iterable[Setting]) -> None:
    """Refuse what the table of a sweep over these settings cannot be sorted by.

    Raises:
      ValueError: names what is allowed.
    """
    allowed = [name for name in columns(settings) if name != SEED]
    if sort is not None and sort not in allowed:
        raise ValueError(f"sort must be one of {', '.join(allowed)}, got {sort!r}")


def table_of(found: Results, sort: str | None = None) -> SweepTable:
    """The table, best first: the highest accuracy, the least of anything else.

    Args:
      found: the sweep.
      sort: a column of `results.csv`, which has a column here then; the accuracy that is measured by default.

    Raises:
      ValueError: `sort` is no such column.
    """
    check_sort(sort, (trial.setting for trial in found.trials))
    by = sort or found.measure
    chosen = [*_keys(found), Column("trials", lambda cell: Shown(cell.status))]
    chosen += [_summary_column(field) for field in _fields(found, by)]
    if found.target is not None:
        chosen += _target_columns(found, found.target)
    cells = _sorted(found, by)
    heads = [column.head for column in chosen]
    return SweepTable(heads, cells, [[column.of(cell) for column in chosen] for cell in cells], len(found.keys))


def explained(found: Results) -> list[str]:
    """What the numbers of the table are, a line each."""
    lines = []
    if found.seeds > 1:
        lines.append("± is the sample deviation over seeds, of the trials that ended")
    if found.target is not None:
        name = NUMBERS[found.measure].label.removeprefix("final ")
        origin = "" if found.asked else ", 0.95 of the best of all trials; choose with --target"
        lines.append(f"target: {name} {formats.accuracy(found.target).text}{origin}")
    return lines


def troubled(found: Results) -> dict[str, list[str]]:
    """Status -> one line for each trial that diverged, was stopped or refused; no status of which there is none."""
    lines: dict[str, list[str]] = {}
    for status in PLURALS:
        for trial in found.trials:
            if trial.status == status:
                lines.setdefault(status, []).append(f"{trial.name}: {trial.reason}" if trial.reason else trial.name)
    return lines


def counted(found: Results) -> str:
    """How many trials did not end, as `1 diverged, 2 refused of 64 trials`; "" where all did."""
    counts = [f"{len(lines)} {PLURALS[status]}" for status, lines in troubled(found).items()]
    return f"{', '.join(counts)} of {len(found.trials)} trials" if counts else ""


def shown(form: formats.Format, spread: Spread | None) -> Shown:
    """A mean over seeds, and its deviation; means of counts are not whole."""
    if spread is None:
        return Shown(MISSING)
    return formats.spread(formats.number if form is formats.count else form, spread.mean, spread.deviation)


def _keys(found: Results) -> list[Column]:
    def column(key: str) -> Column:
        axis = key_axis(key, found)
        labels = axis.labels
        return Column(heads[key], lambda cell: Shown(labels[axis.place(cell.setting)]))

    names = {key: formats.option_name(key) for key in found.keys}
    called = list(names.values())
    heads = {key: key if called.count(name) > 1 else name for key, name in names.items()}
    return [column(key) for key in found.keys]


def _fields(found: Results, by: str) -> list[str]:
    """Fields of the summaries that have a column."""
    measured = [field for field in (*_WHERE_MEASURED, "personal_accuracy") if any(c.spread(field) for c in found.cells)]
    own = [field for field in measured if field == "personal_accuracy"]
    accuracies = [] if found.measure == "final_loss" else ["final_accuracy"]
    fields = [found.measure, *accuracies, *own, *_ALWAYS, *(field for field in measured if field not in own)]
    return list(dict.fromkeys([*fields, *([by] if by in COLUMNS else [])]))


def _summary_column(field: str) -> Column:
    number = NUMBERS[field]
    return Column(number.label, lambda cell: shown(number.form, cell.spread(field)))


def _target_columns(found: Results, target: float) -> list[Column]:
    reach = {id(cell): cell.reached(found.measure, target) for cell in found.cells}

    def column(head: str, form: formats.Format, of: Callable[[Reached], Spread | None]) -> Column:
        def tell(cell: Cell) -> Shown:
            reached = reach[id(cell)]
            if reached.trials and not reached.by:
                return Shown(NOT_REACHED)
            return shown(form, of(reached))

        return Column(head, tell)

    def by_how_many(cell: Cell) -> Shown:
        reached = reach[id(cell)]
        return Shown(f"{reached.by} of {reached.trials}" if reached.trials else MISSING)

    return [
        column("rounds to target", formats.count, lambda reached: reached.rounds),
        column("uplink to target", formats.bits, lambda reached: reached.bits),
        column("seconds to target", formats.number, lambda reached: reached.seconds),
        Column("reached by", by_how_many),
    ]


def _sorted(found: Results, by: str) -> list[Cell]:
    """Cells without a value last; ties in the order of the settings."""
    places = range(len(found.cells))
    if by == "trial":
        order: Sequence[int] = places
    elif by == "status":
        order = sorted(places, key=lambda place: found.cells[place].status)
    elif by in COLUMNS:
        sign = -1 if by in _HIGH_IS_GOOD else 1
        spreads = [cell.spread(by) for cell in found.cells]
        order = sorted(places, key=lambda place: _last_where_none(spreads[place], sign))
    else:
        axis = key_axis(by, found)
        order = sorted(places, key=lambda place: axis.place(found.cells[place].setting))
    return [found.cells[place] for place in order]


def _last_where_none(spread: Spread | None, sign: int) -> tuple[Any, ...]:
    return (1, 0.0) if spread is None else (0, sign * spread.mean)
