"""The benchmarks of TSFA at toy size: what they say of a run against its own log, laws, and the plan's own rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oracles.toy_bert import WORDS, save_toy_bert

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    """What a benchmark prints as JSON."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_controllers_keep_their_word_on_a_toy_model(tmp_path):
    """Each run's log against the cell: dense misses the budget by 4, the queue's law, greedy's budget, the bits."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 300), ("test", 20)):
        lines = (f"{' '.join(rng.choice(WORDS, 5))}\t{rng.integers(2)}" for _ in range(count))
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.json"
    table = run(
        "controllers.py",
        *(tmp_path / "train.tsv", tmp_path / "test.tsv", "--seeds", 1, "--only", "soft_rotated"),
        *("--model", save_toy_bert(tmp_path / "model"), "--out", out),
    )
    found = json.loads(out.read_text())
    cell, runs = found["cells"]["0"], {name.split(" seed")[0]: run for name, run in found["runs"].items()}
    assert table == found["table"] and table.keys() == runs.keys()
    assert np.mean(cell["dense_latency_s"]) == pytest.approx(4 * cell["budget_s"])
    for name, log in runs.items():
        latency_s = np.array(log["latency_s"])
        assert log["latency_over_budget"] == pytest.approx(latency_s.mean() / cell["budget_s"], rel=1e-5)
        if "tsfa" in name:
            paid = (log["queue_s"]["final"] - log["queue_s"]["first"]) / len(latency_s)
            assert latency_s.mean() - cell["budget_s"] <= paid + 1e-4 * cell["budget_s"]
    ratios = np.array(runs["soft_rotated greedy"]["keep_ratio_mean"])
    within = np.array(runs["soft_rotated greedy"]["latency_s"]) <= cell["budget_s"] * (1 + 1e-5)
    assert (within | (ratios <= 1 / 8 + 1e-6)).all() and within.any()
    assert max(runs["soft_rotated tsfa 1/4"]["keep_ratio_mean"]) <= 0.25 + 1e-6
    # All ranks in the same time, as the cell's own dry run of dense uploads has it: the channel is the same.
    quarter = np.array(runs["soft_rotated fixed"]["latency_s"])
    assert (quarter < cell["dense_latency_s"]).all()


@pytest.mark.slow
def test_offline_truth_scores_the_plans_by_runs_of_their_own(tmp_path):
    """The table's numbers follow from the runs; a plan's rank and V are those of a row that was run."""
    out, toy = tmp_path / "out.json", ["rounds=4", "clients.count=8", "clients.per_round=4", "local.steps=2"]
    toy += ["plan.candidates=[1,2]", "plan.pilot_rounds=2", "plan.paths=1", "plan.rollout_rounds=2", "plan.seeds=1"]
    table = run("offline_truth.py", "--seeds", 1, "--budgets", 0.5, "--out", out, "--set", *toy)
    (name, row), (entry,) = *table.items(), json.loads(out.read_text())["runs"].values()
    assert name == "digits, budget 0.5" and row["accuracy"].keys() == {"1", "2"}
    best = max(run["final_accuracy"] for run in entry["runs"].values())
    assert row["accuracy"][str(row["best_rank"])] == best
    for way, plan in entry["plans"].items():
        assert plan["rank"] in (1, 2)
        assert row["planned"][way]["loss_to_best"] == pytest.approx(best - entry["planned"][way]["final_accuracy"])
    assert entry["planned"]["grid"] == entry["runs"][str(entry["plans"]["grid"]["rank"])]
