"""Successive halving: trials that lag behind are stopped, so that the others have their time.

K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
Trials are compared after 1, 2, 4, ... evaluations, and the better half goes on. What they are compared at is ours: the
most that all of them have spent, in rounds, bits or simulated seconds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

Spent = Literal["rounds", "bits", "seconds"]
Metric = Literal["eval_accuracy", "eval_loss", "personal_accuracy"]


class Point(NamedTuple):
    """An evaluation of a trial: what it had spent by then, and the metric, NaN where it is not measured."""

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

    def points(self, lines: Iterable[Mapping[str, Any]]) -> list[Point]:
        """The evaluations in the lines of a log, oldest first."""
        found, bits = [], 0
        for line in lines:
            bits += line["uplink_bits"] + line["downlink_bits"]
            spent = {"rounds": line["round"], "bits": bits, "seconds": line["cumulative_latency_s"]}[self.by]
            if line["eval_accuracy"] is not None:
                value = line[self.metric]
                found.append(Point(spent, math.nan if value is None else value))
        return found

    def rungs(self, eval_every: int, rounds: int) -> Iterator[int]:
        """Rounds after which trials are compared: 1, 2, 4, ... evaluations, before the last."""
        rung = eval_every
        while rung < rounds:
            yield rung
            rung *= 2

    def losers(self, points: Mapping[int, Sequence[Point]]) -> set[int]:
        """The worse half, of an odd number the smaller one: by the last evaluation before all had spent as much.

        Args:
          points: trial -> its evaluations, oldest first.
        """
        common = min((found[-1].spent for found in points.values() if found), default=0.0)
        order = sorted(points, key=lambda trial: (-self._score(points[trial], common), trial))
        return set(order[(len(order) + 1) // 2 :])

    def _score(self, points: Sequence[Point], common: float) -> float:
        """High is good; who diverged, or has no evaluation by then, is last."""
        metric = next((point.metric for point in reversed(points) if point.spent <= common), math.nan)
        signed = -metric if self.metric == "eval_loss" else metric
        return -math.inf if math.isnan(signed) else signed
