"""Plots of runs as SVG text that takes its ink from the page it stands in."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_lora.report.runs import Run

_INK, _GRID = "#010203", "#010204"
"""Colours that no line has: replaced by the page's own, so that a plot reads on light and on dark."""

_COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
"""Mid-tones, legible on white and on near-black."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=_COLORS),
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
}


class Plot(NamedTuple):
    """One plot, or why there is none.

    title: what it shows.
    svg: an `<svg>` element, or "" if there is nothing to draw.
    note: why there is nothing to draw, or "".
    """

    title: str
    svg: str
    note: str = ""


class Line(NamedTuple):
    """Points of one run in one plot; `label` tells the lines of one run apart."""

    x: list[float]
    y: list[float]
    label: str = ""
    dashed: bool = False


def all_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots of a report."""
    return [
        _plot("Accuracy by round", "round", "test accuracy", runs, _accuracy(lambda line: line["round"])),
        _accuracy_by_time(runs),
        _plot(
            "Accuracy by uplink traffic",
            "uplink so far, Mbit",
            "test accuracy",
            runs,
            _accuracy(lambda line: line["uplink_so_far"] / 1e6),
        ),
        _plot("Loss", "round", "cross-entropy", runs, _fields(eval_loss="test", train_loss="training")),
        _plot("Uplink bits of a round", "round", "Mbit", runs, _fields(scale=1e-6, uplink_bits="")),
        _plot("Latency of a round", "round", "seconds", runs, _fields(latency_s="")),
        _plot(
            "Distance from the ideal average",
            "round",
            "Frobenius norm",
            runs,
            _fields(sparsification_error="sparsification", covariance_error="covariance"),
        ),
        _plot("Energy that a client left out", "round", "squared Frobenius norm", runs, _fields(dropped_energy="")),
    ]


def run_colors(count: int) -> list[str]:
    """One colour a run, the same in every plot."""
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    colors = matplotlib.colormaps["turbo"].resampled(count + 2)
    return [to_hex(colors(i + 1)) for i in range(count)]


def _accuracy_by_time(runs: Sequence[Run]) -> Plot:
    title = "Accuracy by simulated time"
    if not any(line["cumulative_latency_s"] for run in runs for line in run.metrics):
        return Plot(title, "", "The runs took no simulated time, or an unbounded one.")
    lines = _accuracy(lambda line: line["cumulative_latency_s"])
    return _plot(title, "simulated time, s", "test accuracy", runs, lines)


def _accuracy(x: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], list[Line]]:
    """Accuracy against `x`, a function of a log line; starts at 0 with the initial accuracy where it is known.

    A run whose clients keep adapters of their own has a second line, of these.
    """

    def lines(run: Run) -> list[Line]:
        points: list[tuple[float | None, float | None]] = [(0.0, run.summary.get("initial_accuracy"))]
        personal: list[tuple[float | None, float | None]] = []
        so_far = 0
        for line in run.metrics:
            so_far += line["uplink_bits"]
            at = x(line | {"uplink_so_far": so_far})
            points.append((at, line["eval_accuracy"]))
            personal.append((at, line["personal_accuracy"]))
        own = _line(personal, "clients' own", dashed=True)
        return [_line(points, "global"), own] if own.x else [_line(points)]

    return lines


def _fields(*, scale: float = 1.0, **labels: str) -> Callable[[Run], list[Line]]:
    """Fields of the log against the round, one line each: the first solid, the second dashed."""

    def lines(run: Run) -> list[Line]:
        return [
            _line([(line["round"], _scaled(line.get(field), scale)) for line in run.metrics], label, dashed=i > 0)
            for i, (field, label) in enumerate(labels.items())
        ]

    return lines


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _line(points: Sequence[tuple[float | None, float | None]], label: str = "", dashed: bool = False) -> Line:
    """The points of which both parts were measured."""
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return Line([x for x, _ in known], [y for _, y in known], label, dashed)


def _plot(title: str, x_label: str, y_label: str, runs: Sequence[Run], lines: Callable[[Run], list[Line]]) -> Plot:
    drawn = [(color, line) for run, color in zip(runs, run_colors(len(runs)), strict=True) for line in lines(run)]
    if not any(line.x for _, line in drawn):
        return Plot(title, "", "Not measured in any round.")
    # A salt of its own keeps the ids of one plot apart from those of the others on the page.
    rc: dict[Any, Any] = _STYLE | {"svg.hashsalt": title}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for color, line in drawn:
            marker = "o" if len(line.x) <= 30 else ""
            style = "--" if line.dashed else "-"
            axes.plot(line.x, line.y, style, color=color, marker=marker, markersize=3, linewidth=1.6)
        axes.set(xlabel=x_label, ylabel=y_label)
        if x_label == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, [line for _, line in drawn])
        return Plot(title, _svg(figure, title))


def _legend(axes: Axes, lines: Sequence[Line]) -> None:
    """What solid and dashed mean; which colour is which run stands beside the plots, once."""
    styles = {line.label: "--" if line.dashed else "-" for line in lines if line.label}
    handles = [axes.plot([], [], style, color=_INK, label=label)[0] for label, style in styles.items()]
    if handles:
        axes.legend(handles=handles)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Ids such as `axes_1` are the same in every figure, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    # The view box alone scales with the page.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{rest}'
