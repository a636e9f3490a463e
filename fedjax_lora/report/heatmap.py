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


def heat_maps(found: Results, axes: Sequence[Axis], measured: Measured) -> str:
    """One map of two axes; of three, one for each value of the third, in colours of one scale.

    The best cell of all is framed; where no trial of a cell has a value, it says why.
    """
    means = [spread.mean for cell in found.cells if (spread := cell.spread(measured.field))]
    if not means:
        return f'<figure class="card">\n<figcaption>{escape(measured.title)}</figcaption>\n{_NOTHING}\n</figure>'
    scale, best = _Scale.of(means), max(means) if measured.high_is_good else min(means)
    rows, columns, *third = axes
    panels = third[0].labels if third else [""]
    grids: list[dict[tuple[int, int], Cell]] = [{} for _ in panels]
    for cell in found.cells:
        row, column, *panel = (axis.place(cell.setting) for axis in axes)
        grids[panel[0] if panel else 0][row, column] = cell
    figures = []
    for panel, grid in zip(panels, grids, strict=True):
        caption = f"{measured.title}, {_named(third[0], panel)}" if third else measured.title
        table = _table(rows, columns, grid, measured, scale, best)
        figures.append(
            f'<figure class="card">\n<figcaption>{escape(caption)}</figcaption>\n'
            f'<div class="scroll">\n{table}\n</div>\n{_legend(scale, measured)}\n</figure>'
        )
    return "\n".join(figures)


_NOTHING = '<p class="note">Not measured in any trial.</p>'


def _named(axis: Axis, label: str) -> str:
    return f"{axis.title} {label}" if len(axis.keys) == 1 else label


def _table(
    rows: Axis, columns: Axis, grid: dict[tuple[int, int], Cell], measured: Measured, scale: _Scale, best: float
) -> str:
    texts = len(rows.settings) * len(columns.settings) <= _MOST_TEXTS
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns.labels)
    lines = [
        f'<tr><td></td><th class="axis" scope="colgroup" colspan="{len(columns.settings)}">{escape(columns.title)}</th>'
        f'</tr>\n<tr><th class="axis" scope="col">{escape(rows.title)}</th>{heads}</tr>'
    ]
    for row, label in enumerate(rows.labels):
        cells = (
            _cell(
                grid.get((row, column)),
                f"{_named(rows, label)}, {_named(columns, of_column)}",
                measured,
                scale,
                best,
                texts,
            )
            for column, of_column in enumerate(columns.labels)
        )
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    kind = "heat" if texts else "heat bare"
    return (
        f'<table class="{kind}">\n<thead>{lines[0]}</thead>\n<tbody>\n' + "\n".join(lines[1:]) + "\n</tbody>\n</table>"
    )


def _cell(cell: Cell | None, place: str, measured: Measured, scale: _Scale, best: float, texts: bool) -> str:
    if cell is None:
        return f'<td class="none" title="{escape(place)}: no trial"></td>'
    spread = cell.spread(measured.field)
    if spread is None:
        each = {trial.status for trial in cell.trials}
        mark = formats.MISSING if cell.told else "diverged" if "diverged" in each else "refused"
        return f'<td class="none" title="{escape(f"{place}: {cell.status}")}">{escape(mark if texts else "×")}</td>'
    ground, ink = scale.color(spread.mean)
    text = measured.form(spread.mean).text if texts else ""
    told = f"{place}: {shown(measured.form, spread).text}, {cell.status} of {len(cell.trials)} trials"
    kind = ' class="best"' if spread.mean == best else ""
    return f'<td{kind} style="background: {ground}; color: {ink}" title="{escape(told)}">{escape(text)}</td>'


def _legend(scale: _Scale, measured: Measured) -> str:
    """The colours from the least to the greatest value, and what the frame is."""
    steps = [step / (_STOPS - 1) for step in range(_STOPS)]
    stops = ", ".join(to_hex(matplotlib.colormaps[_COLORMAP](step)) for step in steps)
    low, high = (escape(measured.form(value).text) for value in (scale.low, scale.high))
    best = "highest" if measured.high_is_good else "lowest"
    return (
        f'<p class="scale">{low}<i style="background: linear-gradient(to right, {stops})"></i>{high}'
        f"{' (logarithmic)' if scale.is_log else ''}; framed: the {best}</p>"
    )
