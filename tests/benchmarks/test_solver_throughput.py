"""The benchmark of solvers at toy size: CVXPY's side against float64 oracles, and the JSON's own arithmetic."""

import json
import sys

import numpy as np
import pytest

from oracles import wireless_oracle


def test_cvxpy_finds_the_least_latency_of_the_oracle(benchmark):
    """Oracle: bisection in float64."""
    pytest.importorskip("cvxpy")
    peers, tsfa = benchmark("solver_peers"), benchmark("solver_tsfa")
    bits, snr_hz, start_s, *_ = (np.float64(x) for x in tsfa.cohort(4, 0))
    expected = wireless_oracle.min_max_latency(bits, snr_hz, start_s, tsfa.BAND_HZ)[0]
    assert peers.least_latency(bits, snr_hz, start_s, tsfa.BAND_HZ) == pytest.approx(expected, rel=1e-5)


def test_the_best_set_of_cvxpy_is_no_worse_than_the_schedules(benchmark):
    """Oracle: each bounds the other, since the sets of three devices are tried by both in full."""
    pytest.importorskip("cvxpy")
    found = benchmark("solver_sets").beside_cvxpy(3, 1, 0.0)
    for row in found.values():
        assert row["objective_above_cvxpy_in_gains"]["max"] == pytest.approx(0.0, abs=2e-4)
        assert row["ratio"] == pytest.approx(row["cvxpy_s"]["median"] / row["ours"]["call_s"]["median"])


def test_the_benchmark_measures_what_it_is_asked_for(benchmark, monkeypatch, tmp_path, capsys):
    """The JSON's own sizes and order."""
    module, out = benchmark("solver_throughput"), tmp_path / "out.json"
    given = ["x", "--parts", "allocation", "--clients", "3", "5", "--cvxpy-clients", "--cases", "2", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", [*given, "--out", str(out)])
    module.main()
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found and found["checks"] == {}
    assert list(found["allocation"]["sizes"]) == ["3", "5"] and found["allocation"]["beside_cvxpy"] == {}
    for row in found["allocation"]["sizes"].values():
        assert row["calls"] == 4 and 0 < row["call_s"]["min"] <= row["call_s"]["median"] <= row["call_s"]["max"]


@pytest.mark.parametrize(("call_s", "holds"), [(0.0009, True), (0.0014, False)])
def test_the_goal_of_tsfa_is_checked(benchmark, call_s, holds):
    """By hand: one millisecond for 256 clients."""
    row = {"round": {"call_s": {"median": call_s}}}
    found = benchmark("solver_throughput").checks({"tsfa": {"sizes": {"256": row, "16": {}}}})
    assert list(found.values()) == [{"asked": "<= 0.001", "value": call_s, "holds": holds}]
