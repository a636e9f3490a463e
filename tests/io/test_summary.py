"""What went wrong in a run, in one line each. The oracle is a count by hand."""

import pytest

from fedjax_lora.io.summary import budget_missed, nothing_learned


def line(number, participants, nonfinite=0, outages=0):
    return {"round": number, "participants": participants, "nonfinite_clients": nonfinite, "outages": outages}


def test_rounds_in_which_somebody_was_heard_are_no_trouble():
    assert nothing_learned([line(1, 1, nonfinite=3), line(2, 2, outages=2)]) is None
    assert nothing_learned([]) is None


@pytest.mark.parametrize(
    ("nonfinite", "outages", "cause"), [(3, 1, "local.optimizer.learning_rate"), (1, 3, "wireless.power_dbm")]
)
def test_lost_rounds_are_counted_with_the_first_and_the_likely_cause(nonfinite, outages, cause):
    lines = [line(1, 4), line(2, 0, nonfinite, outages), line(3, 0, nonfinite, outages), line(4, 1, nonfinite=9)]
    found = nothing_learned(lines)
    assert found.startswith("nothing was learned in 2 of 4 rounds, first in round 2: ") and cause in found
    assert "\n" not in found


def test_a_budget_is_missed_beyond_one_percent():
    summary = {"latency_budget_s": 0.5, "mean_latency_s": 16.7, "final_queue_s": 1234.5}
    found = budget_missed(summary | {"latency_over_budget": 33.4})
    for part in ("16.7 s", "33.4 times", "control.latency_budget_s = 0.5", "1234"):
        assert part in found
    assert budget_missed(summary | {"latency_over_budget": 1.005}) is None
    assert budget_missed(summary | {"latency_over_budget": None}) is None
