"""One plot: lines as SVG text that takes its ink from the page it stands in, and its legend."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INK, GRID = "#010203", "#010204"
"""Colours that no line has: replaced by the page's own, so that a plot reads on light and on dark."""

_COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
"""Mid-tones, legible on white and on near-black."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar is a dollar
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
}

Stroke = Literal["solid", "dashed", "dotted"]


class Line(NamedTuple):
    """Points of one run in one plot; `label` tells the lines of one run apart."""

    x: list[float]
    y: list[float]
    label: str
    stroke: Stroke = "solid"


class Key(NamedTuple):
    """An entry of a legend: a colour of CSS, the stroke of a line, what it stands for."""

    color: str
    stroke: Stroke
    label: str


class Plot(NamedTuple):
    """One plot, or why there is none.

    title: what it shows.
    svg: an `<svg>` element, or "" if there is nothing to draw.
    legend: what its lines are.
    note: why there is nothing to draw, or "".
    """

    title: str
    svg: str
    legend: Sequence[Key] = ()
    note: str = ""


class Axis(NamedTuple):
    """What an axis counts; values with a `unit` are written with a prefix, as `20 Mbit`."""

    label: str
    unit: str = ""
    whole: bool = False


def run_colors(count: int) -> list[str]:
    """One colour a run, the same in every plot."""
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    colors = matplotlib.colormaps["turbo"].resampled(count + 2)
    return [to_hex(colors(i + 1)) for i in range(count)]


def draw(title: str, x: Axis, y: Axis, names: Sequence[str], lines: Sequence[Sequence[Line]]) -> Plot:
    """The lines of each run in its colour; a dotted one that several runs have is nobody's.

    Args:
      title: of the plot; no other one of the page has it.
      x, y: the axes.
      names: of the runs, for the legend.
      lines: of each run; those without points are left out.
    """
    levels = [line.y for of_run in lines for line in of_run if line.stroke == "dotted"]
    drawn = [
        (INK if levels.count(line.y) > 1 else color, line)
        for color, of_run in zip(run_colors(len(names)), lines, strict=True)
        for line in of_run
        if line.x
    ]
    if not drawn:
        return Plot(title, "", note="Not measured in any round.")

    def paint(axes: Axes) -> None:
        for color, line in drawn:
            marker = "o" if len(line.x) <= 30 and line.stroke != "dotted" else ""
            axes.plot(line.x, line.y, color=color, linestyle=line.stroke, marker=marker, markersize=3, linewidth=1.6)
        set_axis(axes, x, "x")
        set_axis(axes, y, "y")

    return painted(title, paint, _legend(names, drawn))


def painted(title: str, paint: Callable[[Axes], None], legend: Sequence[Key] = ()) -> Plot:
    """What `paint` draws; of the colours INK and GRID, what is to read on any page."""
    # A salt of its own keeps the ids of one plot apart from those of the others on the page.
    rc: dict[Any, Any] = _STYLE | {"svg.hashsalt": title}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        paint(figure.add_subplot())
        return Plot(title, _svg(figure, title), legend)


def set_axis(axes: Axes, axis: Axis, which: Literal["x", "y"]) -> None:
    """Name an axis, and write its ticks as what it counts."""
    axes.set(**{f"{which}label": axis.label})
    place = axes.xaxis if which == "x" else axes.yaxis
    if axis.unit:
        place.set_major_formatter(EngFormatter(axis.unit))
    if axis.whole:
        place.set_major_locator(MaxNLocator(integer=True))
    elif which == "x":
        place.set_major_locator(MaxNLocator(5))  # as many labels as there is room for


def _legend(names: Sequence[str], drawn: Sequence[tuple[str, Line]]) -> list[Key]:
    """Which colour is which run, and what each stroke means; of a single run, its lines."""
    if len(names) == 1:
        return [Key(color, line.stroke, line.label) for color, line in drawn]
    runs = [Key(color, "solid", name) for color, name in zip(run_colors(len(names)), names, strict=True)]
    strokes = dict.fromkeys(Key("currentColor", line.stroke, line.label) for _, line in drawn)
    return [*(strokes if len(strokes) > 1 else []), *runs]


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Ids such as `axes_1` are the same in every figure, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # The view box alone scales with the page.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}">{rest}'
