"""Successive halving: who is stopped, and when. By hand throughout."""

import math

import pytest

from fedjax_lora.app.halving import Halving, Point
from fedjax_lora.core.errors import ConfigError


def lines(accuracies, bits=10, latency_s=2.0):
    """A log in which every second round is evaluated; None is the evaluation of a trial that diverged."""
    accuracy = {2 * (place + 1): value for place, value in enumerate(accuracies)}
    return [
        {
            "round": number,
            "uplink_bits": bits,
            "downlink_bits": bits,
            "cumulative_latency_s": number * latency_s,
            "eval_accuracy": accuracy.get(number),
            "eval_loss": None if accuracy.get(number) is None else 1.0,
            "personal_accuracy": None,
        }
        for number in range(1, 2 * len(accuracies) + 1)
    ]


@pytest.mark.parametrize(("by", "spent"), [("rounds", [2, 4]), ("bits", [40, 80]), ("seconds", [4.0, 8.0])])
def test_evaluations_know_what_was_spent(by, spent):
    found = Halving("eval_accuracy", by).points(lines([0.5, 0.6, 0.7]), 4)
    assert found == [Point(spent[0], 0.5), Point(spent[1], 0.6)]


def test_a_metric_that_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match="halving must be by a metric that is measured, got personal_accuracy"):
        Halving("personal_accuracy").points(lines([0.5]), 2)


def test_who_diverged_is_not_finite_at_its_last_evaluation_and_holds_nobody_back():
    """The first was best at round 2; the others are compared at round 4, where they have all been."""
    logs = [lines([0.9, None]), lines([0.5, 0.6]), lines([0.4, 0.8])]
    points = {trial: Halving().points(log, 4) for trial, log in enumerate(logs)}
    assert math.isnan(points[0][-1].metric) and points[0][0] == Point(2, 0.9)
    assert Halving().losers(points) == {0}
    assert Halving().losers({trial: points[trial] for trial in (1, 2)}) == {1}


def test_what_takes_for_ever_is_last():
    endless = [line | {"cumulative_latency_s": None} for line in lines([0.9])]
    points = {0: Halving("eval_accuracy", "seconds").points(endless, 2), 1: [Point(4.0, 0.1)]}
    assert Halving("eval_accuracy", "seconds").losers(points) == {0}


def test_rungs_double_and_end_before_the_last_round():
    assert list(Halving().rungs(2, 17)) == [2, 4, 8, 16]
    assert list(Halving().rungs(2, 16)) == [2, 4, 8]
    assert list(Halving().rungs(5, 5)) == []


def test_the_worse_half_is_stopped_and_who_diverged_first():
    points = {trial: [Point(2, value)] for trial, value in enumerate([0.3, 0.9, math.nan, 0.5, 0.7])}
    assert Halving("eval_accuracy").losers(points) == {0, 2}
    assert Halving("eval_loss").losers(points) == {2, 1}
    assert Halving().losers({7: [Point(2, 0.1)]}) == set()


def test_trials_are_compared_at_what_all_have_spent():
    """On the lines between evaluations: at 25 the first has come to 0.55."""
    points = {0: [Point(10, 0.2), Point(40, 0.9)], 1: [Point(5, 0.3), Point(25, 0.5)]}
    assert Halving("eval_accuracy", "bits").losers(points) == {1}
    points[1] = [Point(5, 0.3), Point(25, 0.6)]
    assert Halving("eval_accuracy", "bits").losers(points) == {0}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_four_that_all_spend_differently_are_compared_by_the_metric(order):
    """At the first rung each is judged by its first evaluation, whatever its place."""
    spent, metric = [10, 20, 40, 80], [0.2, 0.9, 0.4, 0.6]
    points = {place: [Point(spent[trial], metric[trial])] for place, trial in enumerate(order)}
    losers = Halving("eval_accuracy", "bits").losers(points)
    assert {order[place] for place in losers} == {0, 2}


@pytest.mark.parametrize("text", ["accuracy", "eval_loss:joules", ":bits", ""])
def test_what_cannot_be_halved_by_is_one_line(text):
    with pytest.raises(ValueError, match=r"halving must be METRIC or METRIC:COST with a .* of .*, got") as caught:
        Halving.parse(text)
    assert "\n" not in str(caught.value)


def test_metric_and_cost_are_read():
    assert Halving.parse("eval_loss") == Halving("eval_loss", "rounds")
    assert Halving.parse("eval_accuracy:bits") == Halving("eval_accuracy", "bits")
