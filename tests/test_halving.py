"""Successive halving: who is stopped, and when. By hand throughout."""

import math

import pytest

from fedjax_lora.app.halving import Halving, Point


def lines(accuracies, bits=10, latency_s=2.0):
    """A log in which every second round is evaluated."""
    return [
        {
            "round": number,
            "uplink_bits": bits,
            "downlink_bits": bits,
            "cumulative_latency_s": number * latency_s,
            "eval_accuracy": accuracies[number // 2 - 1] if number % 2 == 0 else None,
            "eval_loss": 1.0 if number % 2 == 0 else None,
            "personal_accuracy": None,
        }
        for number in range(1, 2 * len(accuracies) + 1)
    ]


@pytest.mark.parametrize(("by", "spent"), [("rounds", [2, 4]), ("bits", [40, 80]), ("seconds", [4.0, 8.0])])
def test_evaluations_know_what_was_spent(by, spent):
    found = Halving("eval_accuracy", by).points(lines([0.5, 0.6]))
    assert found == [Point(spent[0], 0.5), Point(spent[1], 0.6)]


def test_a_metric_that_is_not_measured_is_nan():
    assert all(math.isnan(point.metric) for point in Halving("personal_accuracy").points(lines([0.5])))


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
    """The second has spent 10 by its first evaluation, the first 40: at 10 only its own first evaluation counts."""
    points = {0: [Point(10, 0.2), Point(40, 0.9)], 1: [Point(10, 0.5)]}
    assert Halving("eval_accuracy", "bits").losers(points) == {0}
    points[1].append(Point(40, 0.6))
    assert Halving("eval_accuracy", "bits").losers(points) == {1}


@pytest.mark.parametrize("text", ["accuracy", "eval_loss:joules", ":bits", ""])
def test_what_cannot_be_halved_by_is_one_line(text):
    with pytest.raises(ValueError, match=r"halving must be METRIC or METRIC:COST with a .* of .*, got") as caught:
        Halving.parse(text)
    assert "\n" not in str(caught.value)


def test_metric_and_cost_are_read():
    assert Halving.parse("eval_loss") == Halving("eval_loss", "rounds")
    assert Halving.parse("eval_accuracy:bits") == Halving("eval_accuracy", "bits")
