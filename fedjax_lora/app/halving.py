"""Successive halving: trials that lag behind are stopped, so that the others have their time.

K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
Trials are compared after 1, 2, 4, ... evaluations, and the better half goes on. What they are compared at is ours: the
most that all of them have spent, in rounds, bits or simulated seconds. Between two evaluations a metric is taken to lie
on a line, and before the first it is the first: a trial that has spent more by then is judged by it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from fedjax_lora.core.errors import ConfigError

Spent = Literal["rounds", "bits", "seconds"]
Metric = Literal["eval_accuracy", "eval_loss", "personal_accuracy"]


class Point(NamedTuple):
    """An evaluation of a trial: what it had spent by then, and the metric; NaN where it is not finite."""

    spent: float
    metric: float


class Halving(NamedTuple):
    """Which trials are stopped.

    metric: of an evaluation; a loss is to be low, an accuracy high. by: what trials spend.
    """

    metric: Metric = "eval_accuracy"
    by: Spent = "rounds"

    @classmethod
    def parse(cls, text: str) -> "Halving":
        """Of `metric` or `metric:by`.

        Raises:
          ValueError: names what is allowed.
        """
        metric, _, by = text.partition(":")
        for name, value, allowed in (("metric", metric, get_args(Metric)), ("cost", by or "rounds", get_args(Spent))):
            if value not in allowed:
                raise ValueError(
                    f"halving must be METRIC or METRIC:COST with a {name} of {', '.join(allowed)}, got {text!r}"
                )
        return cls(cast(Metric, metric), cast(Spent, by or "rounds"))

    def points(self, lines: Iterable[Mapping[str, Any]], rung: int) -> list[Point]:
        """The evaluations in the lines of a log up to a round, oldest first; the last line is one, finite or not.

        Raises:
          ConfigError: the metric is not measured where others are.
        """
        found, bits = [], 0
        lines = [line for line in lines if line["round"] <= rung]
        for line in lines:
            bits += line["uplink_bits"] + line["downlink_bits"]
            spent = {"rounds": line["round"], "bits": bits, "seconds": line["cumulative_latency_s"]}[self.by]
            if line["eval_loss"] is None and line is not lines[-1]:
                continue
            if line[self.metric] is None and line["eval_loss"] is not None:
                raise ConfigError(f"halving must be by a metric that is measured, got {self.metric}")
            if line[self.metric] is None or spent is None:
                found.append(Point(math.inf, math.nan))
            else:
                found.append(Point(spent, line[self.metric]))
        return found

    def rungs(self, eval_every: int, rounds: int) -> Iterator[int]:
        """Rounds after which trials are compared: 1, 2, 4, ... evaluations, before the last."""
        rung = eval_every
        while rung < rounds:
            yield rung
            rung *= 2

    def losers(self, points: Mapping[int, Sequence[Point]]) -> set[int]:
        """The worse half, of an odd number the smaller one: by what all of those that did not diverge have spent.

        Args:
          points: trial -> its evaluations, oldest first.
        """
        common = min((found[-1].spent for found in points.values()), default=0.0)
        order = sorted(points, key=lambda trial: (-self._score(points[trial], common), trial))
        return set(order[(len(order) + 1) // 2 :])

    def _score(self, points: Sequence[Point], common: float) -> float:
        """High is good; who diverged is last."""
        if math.isnan(points[-1].metric):
            return -math.inf
        finite = [point for point in points if not math.isnan(point.metric)]
        metric = float(np.interp(common, [point.spent for point in finite], [point.metric for point in finite]))
        return -metric if self.metric == "eval_loss" else metric
