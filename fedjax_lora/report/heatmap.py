"""Heat maps as tables of HTML: two axes of a sweep, a colour and a value for each cell."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.colors import to_hex

from fedjax_lora.report import drawing, formats
from fedjax_lora.report.axes import Axis, spans_orders
from fedjax_lora.report.cells import Cell, Results
from fedjax_lora.report.sweep_tables import shown

_MOST_TEXTS = 150
"""Cells that have their values written in."""

_COLORMAP = "viridis"
_STOPS = 8


class Measured(NamedTuple):
    """What is compared: its title, a field of the summaries, how it is written and counted, whether high is good."""

    title: str
    field: str
    form: formats.Format
    axis: drawing.Axis
    high_is_good: bool = False


class _Scale(NamedTuple):
    """From the least to the greatest mean, in equal steps or in equal ratios."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, means: Sequence[float]) -> "_Scale":
        return cls(min(means), max(means), spans_orders(means))

    def color(self, value: float) -> tuple[str, str]:
        """Of the ground, and of what is written on it."""
        low, high, at = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        ground = matplotlib.colormaps[_COLORMAP]((at - low) / (high - low) if high > low else 0.5)
        light = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2]
        return to_hex(ground), "#111" if light > 0.5 else "#fff"


class _Look(NamedTuple):
    """How the cells of a map look; best: the mean that is framed, None where several have it."""

    measured: Measured
    scale: _Scale
    best: float | None


def heat_maps(found: Results, axes: Sequence[Axis], measured: Measured) -> str:
    """One map of two axes; of three, one for each value of the third, in colours of one scale.

    The best cell of all is framed; where no trial of a cell has a value, it says why.
    """
    if not (whole := means(found, measured.field)):
        return f'<figure class="card">\n<figcaption>{escape(measured.title)}</figcaption>\n{_NOTHING}\n</figure>'
    best = max(whole) if measured.high_is_good else min(whole)
    look = _Look(measured, _Scale.of(whole), best if whole.count(best) == 1 else None)
    rows, columns, *third = axes
    panels = third[0].labels if third else [""]
    grids: list[dict[tuple[int, int], Cell]] = [{} for _ in panels]
    for cell in found.cells:
        row, column, *panel = (axis.place(cell.setting) for axis in axes)
        grids[panel[0] if panel else 0][row, column] = cell
    figures = []
    for panel, grid in zip(panels, grids, strict=True):
        caption = f"{measured.title}; {third[0].named(panel)}" if third else measured.title
        figures.append(
            f'<figure class="card">\n<figcaption>{escape(caption)}</figcaption>\n'
            f'<div class="scroll">\n{_table(rows, columns, grid, look)}\n</div>\n{_legend(look, grid)}\n</figure>'
        )
    return "\n".join(figures)


def means(found: Results, field: str) -> list[float]:
    """Of a field of the summaries, of each cell that has it."""
    return [spread.mean for cell in found.cells if (spread := cell.spread(field))]


_NOTHING = '<p class="note">Not measured in any trial.</p>'


def _table(rows: Axis, columns: Axis, grid: dict[tuple[int, int], Cell], look: _Look) -> str:
    texts = len(rows.settings) * len(columns.settings) <= _MOST_TEXTS
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns.labels)
    head = (
        f'<tr><td></td><th class="axis" scope="colgroup" colspan="{len(columns.settings)}">{escape(columns.title)}</th>'
        f'</tr>\n<tr><th class="axis" scope="col">{escape(rows.title)}</th>{heads}</tr>'
    )
    lines = []
    for row, label in enumerate(rows.labels):
        cells = (
            _cell(grid.get((row, column)), f"{rows.named(label)}, {columns.named(across)}", look, texts)
            for column, across in enumerate(columns.labels)
        )
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    kind = "heat" if texts else "heat bare"
    return f'<table class="{kind}">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _cell(cell: Cell | None, place: str, look: _Look, texts: bool) -> str:
    if cell is None:
        return f'<td class="none" title="{escape(place)}: no trial"></td>'
    spread = cell.spread(look.measured.field)
    if spread is None:
        each = {trial.status for trial in cell.trials}
        mark = formats.MISSING if cell.told else "diverged" if "diverged" in each else "refused"
        return f'<td class="none" title="{escape(f"{place}: {cell.status}")}">{escape(mark if texts else "×")}</td>'
    ground, ink = look.scale.color(spread.mean)
    text = look.measured.form(spread.mean).text + ("" if cell.is_whole else "*") if texts else ""
    trials = f"; {cell.status} of {len(cell.trials)} trials" if len(cell.trials) > 1 or not cell.is_whole else ""
    told = f"{place}: {shown(look.measured.form, spread).text}{trials}"
    kind = ' class="best"' if spread.mean == look.best else ""
    return f'<td{kind} style="background: {ground}; color: {ink}" title="{escape(told)}">{escape(text)}</td>'


def _legend(look: _Look, grid: dict[tuple[int, int], Cell]) -> str:
    """The colours from the least to the greatest value, and what the marks are."""
    steps = [step / (_STOPS - 1) for step in range(_STOPS)]
    stops = ", ".join(to_hex(matplotlib.colormaps[_COLORMAP](step)) for step in steps)
    low, high = (escape(look.measured.form(value).text) for value in (look.scale.low, look.scale.high))
    marks = ["logarithmic"] if look.scale.is_log else []
    if look.best is not None:
        marks.append(f"framed: the {'highest' if look.measured.high_is_good else 'lowest'}")
    if any(cell.told and not cell.is_whole for cell in grid.values()):
        marks.append("*: not every trial ended")
    bar = f'{low}<i style="background: linear-gradient(to right, {stops})"></i>{high}'
    return f'<p class="scale">{bar}<br/>{"; ".join(marks)}</p>'
