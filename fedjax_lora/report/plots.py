"""Which plots a report has, and what their lines are."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from fedjax_lora.io.summary import OF_TASK
from fedjax_lora.report.drawing import Axis, Line, Plot, Stroke, draw
from fedjax_lora.report.formats import metric_name
from fedjax_lora.report.runs import BUDGET, Run, labels

_ROUND = Axis("round", whole=True)
_ACCURACY = Axis("test accuracy")

_Points = Sequence[tuple[float | None, float | None]]


def all_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots of a report: what was learned, what it cost, how well the server averaged."""

    def plot(title: str, x: Axis, y: Axis, lines: Callable[[Run], list[Line]]) -> Plot:
        return draw(title, x, y, labels(runs), [lines(run) for run in runs])

    takes_time = any(line.get("cumulative_latency_s") for run in runs for line in run.metrics)
    of_task = [
        plot(metric_name(name).capitalize(), _ROUND, Axis(metric_name(name)), _fields(**{name: "test"}))
        for name in dict.fromkeys(name for run in runs for line in run.metrics for name in line)
        if name.startswith(OF_TASK)
    ]
    plots = [
        *(_accuracy_plots(plot, takes_time) if _accurate(runs) else []),
        plot("Loss", _ROUND, Axis("loss"), _fields(eval_loss="test", train_loss="training")),
        *of_task,
        plot("Latency of a round", _ROUND, Axis("seconds"), _latency),
    ]
    if any(_budget_s(run) or any(_column(run, "queue_s")) for run in runs):
        plots.append(plot("Queue of the latency budget", _ROUND, Axis("seconds"), _queue))
    plots += [
        plot("Keep ratio", _ROUND, Axis("mean of the clients"), _fields(keep_ratio_mean="keep ratio")),
        plot("Uplink of a round", _ROUND, Axis("uplink", "bit"), _fields(uplink_bits="uplink")),
        plot("Energy of a round", _ROUND, Axis("all clients", "J"), _energy),
    ]
    if any(any(_column(run, "energy_queue_j")) for run in runs):
        queue = _fields(energy_queue_j="queue")
        plots.append(plot("Queue of the energy budget", _ROUND, Axis("of a client", "J"), queue))
    errors = _fields(sparsification_error="sparsification", covariance_error="covariance")
    dropped = _fields(dropped_energy="left out")
    return [
        *plots,
        plot("Distance from the ideal average", _ROUND, Axis("Frobenius norm"), errors),
        plot("Energy that a client left out", _ROUND, Axis("squared Frobenius norm"), dropped),
    ]


def _accuracy_plots(plot: Callable[..., Plot], takes_time: bool) -> list[Plot]:
    """Accuracy against all that is spent."""
    return [
        plot("Accuracy by round", _ROUND, _ACCURACY, lambda run: _accuracy(run, _column(run, "round"))),
        plot(
            "Accuracy by simulated time",
            Axis("simulated time, s"),
            _ACCURACY,
            lambda run: _accuracy(run, _column(run, "cumulative_latency_s")),
        )
        if takes_time
        else Plot("Accuracy by simulated time", "", note="The runs took no simulated time, or an unbounded one."),
        plot("Accuracy by uplink traffic", Axis("uplink so far", "bit"), _ACCURACY, _accuracy_by_uplink),
    ]


def _accurate(runs: Sequence[Run]) -> bool:
    """Whether any of the tasks has an accuracy, or none has been evaluated yet."""
    evaluated = [line for run in runs for line in run.metrics if line.get("eval_loss") is not None]
    return not evaluated or any(line.get("eval_accuracy") is not None for line in evaluated)


def _accuracy(run: Run, x: Sequence[float | None]) -> list[Line]:
    """Accuracy against `x` of each round; starts at 0 with the initial accuracy where it is known.

    A run whose clients keep adapters of their own has a second line, of these.
    """
    start = (0.0, run.summary.get("initial_accuracy"))
    of_server = [start, *zip(x, _column(run, "eval_accuracy"), strict=True)]
    own = _line(list(zip(x, _column(run, "personal_accuracy"), strict=True)), "clients' own", "dashed")
    return [_line(of_server, "global"), own] if own.x else [_line(of_server, "test accuracy")]


def _accuracy_by_uplink(run: Run) -> list[Line]:
    return _accuracy(run, list(accumulate(bits or 0 for bits in _column(run, "uplink_bits"))))


def _fields(**names: str) -> Callable[[Run], list[Line]]:
    """Fields of the log against the round, one line each: the first solid, the second dashed."""
    strokes: tuple[Stroke, ...] = ("solid", "dashed")
    return lambda run: [
        _by_round(run, _column(run, field), name, stroke)
        for (field, name), stroke in zip(names.items(), strokes, strict=False)
    ]


def _latency(run: Run) -> list[Line]:
    elapsed = _column(run, "cumulative_latency_s")
    mean = [None if s is None else s / number for number, s in enumerate(elapsed, 1)]
    return [
        _by_round(run, _column(run, "latency_s"), "each round"),
        _by_round(run, mean, "mean so far", "dashed"),
        _level(run, _budget_s(run), "budget"),
    ]


def _queue(run: Run) -> list[Line]:
    return [_by_round(run, _column(run, "queue_s"), "queue"), _level(run, _budget_s(run), "budget of one round")]


def _energy(run: Run) -> list[Line]:
    """Beside the budget, which is of a client on average, the mean that it is of."""
    energy, budget = _column(run, "energy_j"), run.config.get("control.energy_budget_j")
    clients = run.config.get("clients.per_round") or run.config.get("clients.count")
    each = _by_round(run, energy, "each round")
    if not budget or not clients:
        return [each]
    sums = accumulate(joules or 0 for joules in energy)
    mean = [so_far / number for number, so_far in enumerate(sums, 1)]
    return [each, _by_round(run, mean, "mean so far", "dashed"), _level(run, budget * clients, "budget of all clients")]


def _budget_s(run: Run) -> float | None:
    return run.config.get(BUDGET)


def _column(run: Run, field: str) -> list[Any]:
    return [line.get(field) for line in run.metrics]


def _by_round(run: Run, values: Sequence[float | None], label: str, stroke: Stroke = "solid") -> Line:
    return _line(list(zip(_column(run, "round"), values, strict=True)), label, stroke)


def _level(run: Run, value: float | None, label: str) -> Line:
    """A dotted line over all rounds."""
    return _line([(0, value), (len(run.metrics), value)], label, "dotted")


def _line(points: _Points, label: str, stroke: Stroke = "solid") -> Line:
    """The points of which both parts were measured."""
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return Line([x for x, _ in known], [y for _, y in known], label, stroke)
