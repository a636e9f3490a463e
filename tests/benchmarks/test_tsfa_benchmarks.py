"""The benchmarks of TSFA at toy size: what they say of a run against its own log, laws, and the plan's own rows."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fedjax_lora import build, load_config
from fedjax_lora.app import trials
from fedjax_lora.config.sweeps import overrides
from fedjax_lora.core.network import Radio
from fedjax_lora.planning.bound import Measured
from fedjax_lora.planning.rank_search import Candidate
from oracles import wireless_oracle
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
def test_controllers_keep_their_word_on_a_toy_model(tmp_path, monkeypatch, capsys):
    """The cell's dry run of dense uploads is the run itself, round by round; each run's log obeys its controller."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    controllers = importlib.import_module("controllers")
    controller = controllers.controller

    def eased(name, budget_s, start=None):  # dense uploads take 4 budgets on average, which `greedy` can keep to
        return controller(name, 4 * budget_s if name == "greedy" else budget_s, start)

    for name, value in {
        "QUEUES": [0.0, 1.0, 8.0],
        "ELSEWHERE": 2,
        "PRACTICE_ROUNDS": 2,
        "SETTING": {**controllers.SETTING, "rounds": 16},
        "SPARSIFIERS": {"soft_rotated": controllers.SPARSIFIERS["soft_rotated"]},
        "controller": eased,
    }.items():
        monkeypatch.setattr(controllers, name, value)
    rng, files = np.random.default_rng(0), [tmp_path / "train.tsv", tmp_path / "test.tsv"]
    for file, count in zip(files, (300, 20), strict=True):
        lines = (f"{' '.join(rng.choice(WORDS, 5))}\t{rng.integers(2)}" for _ in range(count))
        file.write_text("\n".join(lines) + "\n")
    model, out = save_toy_bert(tmp_path / "model"), tmp_path / "out.json"
    command = ["controllers.py", *files, "--seeds", 1, "--model", model, "--out", out, "--folder", tmp_path / "sweep"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    controllers.main()
    table, found = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    cell, runs = found["cells"]["0"], {name.split(" seed")[0]: run for name, run in found["runs"].items()}
    assert table.keys() == runs.keys() == {f"soft_rotated {name}" for name in controllers.CONTROLLERS}

    setting = [*overrides(controllers.SETTING), "sparsifier.name=dense", "control.name=fixed", "seed=0"]
    setting += [f"model.pretrained={model}", f"data.train={files[0]}", f"data.test={files[1]}"]
    simulation = build(load_config(None, setting))
    _, dense = simulation.run(simulation.init(jax.random.key(0)), 16)
    np.testing.assert_allclose(cell["dense_latency_s"], dense.latency_s, rtol=1e-5)
    assert cell["dense_uplink_bits"] == dense.uplink_bits.sum()
    budget_s = cell["budget_s"]
    assert budget_s == pytest.approx(np.mean(dense.latency_s) / 4)
    for name, log in runs.items():
        latency_s = np.array(log["latency_s"])
        assert table[name]["bits_share_of_dense"] == pytest.approx(log["uplink_bits"] / np.sum(dense.uplink_bits))
        apart = log["accuracy"] - runs["soft_rotated ideal"]["accuracy"]
        assert table[name]["accuracy_over_ideal"] == pytest.approx(apart)
        if "tsfa" in name:
            paid = (log["queue_s"]["final"] - log["queue_s"]["first"]) / len(latency_s)
            assert latency_s.mean() - budget_s <= paid + 1e-4 * budget_s
    # The dry run by which they start foresees the latency, but for what training with other ratios changes.
    for name in controllers.LIMITS:
        found, run_ = cell["tsfa"][f"soft_rotated {name}"], runs[f"soft_rotated {name}"]
        assert run_["queue_s"]["first"] == pytest.approx(found["start"]["queue"] * budget_s, rel=1e-5)
        assert run_["latency_over_budget"] == pytest.approx(found["latency_over_budget"], rel=0.1)
    ratios = np.array(runs["soft_rotated greedy"]["keep_ratio_mean"])
    within = np.array(runs["soft_rotated greedy"]["latency_s"]) <= 4 * budget_s * (1 + 1e-5)
    assert (within | (ratios <= 1 / 8 + 1e-6)).all() and within.any() and ratios.min() < 0.5 < ratios.max()
    assert max(runs["soft_rotated tsfa 1/4"]["keep_ratio_mean"]) <= 0.25 + 1e-6
    assert (np.array(runs["soft_rotated fixed"]["latency_s"]) < dense.latency_s).all()  # a quarter on the same channel

    monkeypatch.delattr(controllers, "measure_cell")  # called again it has nothing to do
    monkeypatch.delattr(trials, "Lanes")
    kept = json.loads(out.read_text())
    controllers.main()
    again = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == table and again | {"environment": kept["environment"]} == kept


def benchmark(out, toy):
    return run("offline_truth.py", "--seeds", 1, "--runs", 2, "--budgets", 0.5, "--out", out, "--set", *toy)


@pytest.mark.slow
def test_offline_truth_scores_the_plans_by_runs_of_their_own(tmp_path):
    """The table's numbers follow from the runs: at each rank with V and queue of the grid, and as each way planned."""
    out, toy = tmp_path / "out.json", ["rounds=4", "clients.count=8", "clients.per_round=4", "local.steps=2"]
    toy += ["plan.candidates=[1,2]", "plan.pilot_rounds=2", "plan.paths=1", "plan.rollout_rounds=2", "plan.seeds=1"]
    table = benchmark(out, toy)
    (name, row), (entry,) = *table.items(), json.loads(out.read_text())["runs"].values()
    assert name == "digits, budget 0.5" and row["accuracy"].keys() == {"1", "2"}
    by_setting = {(r["rank"], r["V"], r["queue_s"]): r["final_accuracy"] for r in entry["runs"]}
    rows = {way: {row["rank"]: row for row in plan["rows"]} for way, plan in entry["plans"].items()}
    found = {way: {r: by_setting.get((r, row["V"], row["queue_s"])) for r, row in rows[way].items()} for way in rows}
    for run_ in entry["runs"]:
        assert len(run_["accuracies"]) == 2 and np.mean(run_["accuracies"]) == pytest.approx(run_["final_accuracy"])
    assert row["accuracy"] == pytest.approx({str(rank): value for rank, value in found["grid"].items()})
    assert found["grid"][row["best_rank"]] == max(found["grid"].values())
    for way, plan in entry["plans"].items():
        loss = max(found["grid"].values()) - found[way][plan["rank"]]
        assert row["planned"][way]["loss_to_best"] == pytest.approx(loss)

    # Called again it has nothing to do; without one plan it makes that plan and runs nothing that it holds.
    kept = json.loads(out.read_text())
    assert benchmark(out, toy) == table and json.loads(out.read_text()) == kept
    (entry,) = kept["runs"].values()
    rollout = entry["plans"].pop("rollout")
    entry["runs"] = [run_ | {"git_commit": "before"} for run_ in entry["runs"]]
    out.write_text(json.dumps(kept))
    assert benchmark(out, toy) == table
    (entry,) = json.loads(out.read_text())["runs"].values()
    assert entry["plans"]["rollout"] == rollout and {run_["git_commit"] for run_ in entry["runs"]} == {"before"}


def test_the_budget_is_a_share_of_what_dense_uploads_take(monkeypatch):
    """Oracle: a loop in float64 over those who are there and are heard; one client is padding, one fades in a round."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rng, bits = np.random.default_rng(0), np.array([[1e6, 2e6], [1e6, 4e6]])
    snr_hz, start_s = 10 ** rng.uniform(6.5, 8, (2, 3, 5, 4)), rng.uniform(0, 0.2, (2, 3, 5, 4))
    snr_hz[-1, 1, 2, 0], weights = 0.0, np.array([[0.5, 0.3, 0.2, 0.0]] * 2)
    expected = []
    for snr, start in zip(snr_hz[-1].reshape(-1, 4), start_s[-1].reshape(-1, 4), strict=True):
        heard = (snr > 0) & (weights[-1] > 0)
        alone = np.full(heard.sum(), 4e6), snr[heard], start[heard], 2e7
        expected.append(wireless_oracle.min_max_latency(*alone)[0])
    band_hz, power_w = np.full((2, 3, 5), 2e7), np.full((2, 3, 5), 0.01)
    nothing = np.zeros(2)  # of what a budget does not depend on
    candidates = Candidate(
        measured=Measured(*[nothing] * len(Measured._fields)),
        rank=np.array([1.0, 2.0]),
        weights=weights,
        tail_energy=nothing,
        bits=bits,
        sparsification=nothing,
        covariance=nothing,
        radio=Radio(*map(np.float32, (snr_hz, start_s, band_hz, power_w))),
    )
    known = SimpleNamespace(candidates=candidates)
    found = importlib.import_module("offline_truth").dense_latency_s(known)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
