"""Plots of a sweep: a curve a cell, the mean over its seeds in a band of a deviation; and what came of each value."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fedjax_lora.report import drawing
from fedjax_lora.report.axes import Axis
from fedjax_lora.report.cells import Cell, Measure, Results, Spread
from fedjax_lora.report.drawing import INK, Key, Plot, Stroke, painted, run_colors, set_axis
from fedjax_lora.report.heatmap import Measured
from fedjax_lora.report.runs import Run

_MOST_BANDS = 12
_MOST_LEGEND, _FEW_OF_MANY = 8, 5
_LONGEST_TICK = 18  # characters
_MOST_TICKS = 6
_FAILED = Key("transparent", "solid", "× no trial came to an end")
_STROKES: tuple[Stroke, ...] = ("solid", "dashed", "dotted")

_ROUND = drawing.Axis("round", whole=True)
_Column = Callable[[Run], Sequence[float | None]]


_CALLED: dict[Measure, str] = {
    "final_accuracy": "test accuracy",
    "personal_accuracy": "clients' own accuracy",
    "final_loss": "test loss",
}


class Curve(NamedTuple):
    """The means over a cell's seeds, at points that all of them have.

    x, y: means. deviation: of y, 0 of a single trial. color, stroke: of the line.
    """

    x: list[float]
    y: list[float]
    deviation: list[float]
    color: str
    stroke: Stroke


def curves(found: Results, axes: Sequence[Axis]) -> list[Plot]:
    """What was learned and what it cost, round by round; coloured by the first axis, a short second one by strokes."""
    legend, look = _legend(axes), _look(axes)
    word = "Loss" if found.measure == "final_loss" else "Accuracy"
    measured = drawing.Axis(_CALLED[found.measure])

    def plot(title: str, x: drawing.Axis, y: drawing.Axis, of_x: _Column, of_y: _Column) -> Plot:
        return _plot(title, x, y, [_curve(cell, *look(cell), of_x, of_y) for cell in found.cells], legend)

    takes_time = any(line.get("cumulative_latency_s") for run in found.runs for line in run.metrics)
    start = "initial_accuracy" if found.measure == "final_accuracy" else None
    learned = _with_start(_field(found.of_line), start)
    rounds, elapsed = _field("round"), _field("cumulative_latency_s")
    by_time = drawing.Axis("simulated time, s")
    plots = [
        plot(f"{word} by round", _ROUND, measured, _from_zero(rounds), learned),
        plot(f"{word} by uplink traffic", drawing.Axis("uplink so far", "bit"), measured, _from_zero(_uplink), learned),
        plot(f"{word} by simulated time", by_time, measured, _from_zero(elapsed), learned)
        if takes_time
        else Plot(f"{word} by simulated time", "", note="The trials took no simulated time, or an unbounded one."),
    ]
    if found.measure != "final_loss":
        plots.append(plot("Test loss", _ROUND, drawing.Axis("loss"), rounds, _field("eval_loss")))
    plots += [
        plot("Latency of a round, mean so far", _ROUND, drawing.Axis("seconds"), rounds, _mean_latency),
    ]
    if any(line.get("queue_s") for run in found.runs for line in run.metrics):
        queue = plot("Queue of the latency budget", _ROUND, drawing.Axis("seconds"), rounds, _field("queue_s"))
        plots.append(queue)
    return plots


def has_bands(found: Results) -> bool:
    """Whether the lines are few enough for bands, and there are seeds to differ."""
    return found.seeds > 1 and len(found.cells) <= _MOST_BANDS


def points(title: str, measured: Measured, found: Results, axis: Axis, colored: Axis) -> Plot:
    """A field of the summaries against an axis: a mark and a deviation for each cell; a cross where no trial ended."""
    place, colors = axis.numbers or list(range(len(axis.settings))), colored.colors
    drawn = [
        (place[axis.place(cell.setting)], spread, colors[colored.place(cell.setting)])
        for cell in found.cells
        if (spread := cell.spread(measured.field))
    ]
    if not drawn:
        return Plot(title, "", note="Not measured in any trial.")

    failed = [place[axis.place(cell.setting)] for cell in found.cells if not cell.told]

    def paint(axes: Axes) -> None:
        for x, spread, color in drawn:
            axes.errorbar(x, spread.mean, spread.deviation or None, fmt="o", color=color, markersize=5, capsize=3)
        axes.plot(failed, [0.03] * len(failed), "x", color=INK, transform=axes.get_xaxis_transform())
        _set_values(axes, axis)
        set_axis(axes, measured.axis, "y")

    legend = [] if colored.keys == axis.keys else _legend([colored])
    return painted(title, paint, [*legend, *([_FAILED] if failed else [])])


def _set_values(axes: Axes, axis: Axis) -> None:
    """The ticks of the x axis: a few values themselves, numbers where these are."""
    numbers, labels = axis.numbers, axis.labels
    axes.set_xlabel(axis.title)
    if numbers is None:
        labels = [label if len(label) <= _LONGEST_TICK else f"{label[:_LONGEST_TICK]}…" for label in labels]
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if sum(map(len, labels)) > 40 else {}
        axes.set_xticks(range(len(labels)), labels, **turned)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        return
    if axis.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if len(numbers) <= _MOST_TICKS:
        axes.set_xticks(numbers, [f"{value:.4g}" for value in numbers])


def _plot(title: str, x: drawing.Axis, y: drawing.Axis, lines: Sequence[Curve], legend: Sequence[Key]) -> Plot:
    drawn = [line for line in lines if line.x]
    if not drawn:
        return Plot(title, "", note="Not measured in any round.")
    few = len(lines) <= _MOST_BANDS

    def paint(axes: Axes) -> None:
        for line in drawn:
            if few and any(line.deviation):
                low, high = ([a + sign * d for a, d in zip(line.y, line.deviation, strict=True)] for sign in (-1, 1))
                axes.fill_between(line.x, low, high, color=line.color, alpha=0.18, linewidth=0)
            marker = "o" if len(line.x) <= 30 and few else ""
            width = 1.6 if few else 1.0
            axes.plot(
                line.x, line.y, color=line.color, linestyle=line.stroke, marker=marker, markersize=3, linewidth=width
            )
        set_axis(axes, x, "x")
        set_axis(axes, y, "y")

    return painted(title, paint, legend)


def _curve(cell: Cell, color: str, stroke: Stroke, of_x: _Column, of_y: _Column) -> Curve:
    """Of the trials that the cell's numbers are of; where all diverged, of these, as far as they went."""
    x, y, deviation = [], [], []
    for of_runs in zip(*(zip(of_x(run), of_y(run), strict=True) for run in cell.told or cell.run), strict=False):
        across, up = (Spread.of(values) for values in zip(*of_runs, strict=True))
        if across and up and across.size == up.size == len(of_runs):
            x.append(across.mean)
            y.append(up.mean)
            deviation.append(up.deviation or 0.0)
    return Curve(x, y, deviation, color, stroke)


def _look(axes: Sequence[Axis]) -> Callable[[Cell], tuple[str, Stroke]]:
    """Cell -> colour and stroke of its line."""
    if not axes:
        return lambda cell: (run_colors(1)[0], "solid")
    colors, first, has_strokes = axes[0].colors, axes[0], _has_strokes(axes)
    return lambda cell: (
        colors[first.place(cell.setting)],
        _STROKES[axes[1].place(cell.setting)] if has_strokes else "solid",
    )


def _has_strokes(axes: Sequence[Axis]) -> bool:
    return len(axes) == 2 and len(axes[1].settings) <= len(_STROKES)


def _legend(axes: Sequence[Axis]) -> list[Key]:
    """What the colours are, of many in an order a few; and the strokes."""
    if not axes:
        return []
    first = axes[0]
    labels = list(map(first.named, first.labels))
    keys = [Key(color, "solid", label) for color, label in zip(first.colors, labels, strict=True)]
    if (numbers := first.numbers) and len(keys) > _MOST_LEGEND:
        places = [round(i * (len(keys) - 1) / (_FEW_OF_MANY - 1)) for i in range(_FEW_OF_MANY)]
        keys = [Key(first.colors[place], "solid", first.named(f"{numbers[place]:.3g}")) for place in places]
    if not _has_strokes(axes):
        return keys
    labels = map(axes[1].named, axes[1].labels)
    return [*(Key("currentColor", stroke, label) for stroke, label in zip(_STROKES, labels, strict=False)), *keys]


def _field(name: str) -> _Column:
    return lambda run: [line.get(name) for line in run.metrics]


def _from_zero(column: _Column) -> _Column:
    return lambda run: [0.0, *column(run)]


def _with_start(column: _Column, start: str | None) -> _Column:
    """Before the first round, a field of the summary."""
    return lambda run: [run.summary.get(start) if start else None, *column(run)]


def _uplink(run: Run) -> list[float]:
    return list(accumulate(line["uplink_bits"] or 0 for line in run.metrics))


def _mean_latency(run: Run) -> list[float | None]:
    elapsed = (line["cumulative_latency_s"] for line in run.metrics)
    return [None if s is None else s / number for number, s in enumerate(elapsed, 1)]
