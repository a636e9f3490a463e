"""Sweeps on disk and in Python. Oracle: runs of their own, or the same sweep without what was done to it."""

import csv
import dataclasses
import re
import shutil
import warnings

import jax
import numpy as np
import pytest
from rich.console import Console

import fedjax_lora as fl
from fedjax_lora.app import trials
from fedjax_lora.app.halving import Halving
from fedjax_lora.app.runner import run
from fedjax_lora.app.sweep_folder import sweep_into
from fedjax_lora.config.groups import grouped
from fedjax_lora.config.sweeps import folder_name, grid, overrides
from fedjax_lora.core.errors import ConfigError, RunWarning
from fedjax_lora.io.run_files import read_metrics, read_summary
from toy import config, simulation

SHORT = ("rounds=4", "engine.eval_every=2")
TIMES = {"wall_s", "compile_s"}
SETTINGS = [
    *grid({"seed": [0, 1], "control.keep_ratio": [0.4, 0.8]}),
    {"seed": 0, "local.optimizer.learning_rate": 1e9},
    {"seed": -1},
]


def load(setting):
    return config(*SHORT, *overrides(setting))


def near(value, rel):
    """What a line of a log may hold in its place: as much in float32, and null for null alone."""
    return None if value is None else pytest.approx(value, rel=rel, abs=1e-5)


def rows(path):
    """`results.csv` without its times."""
    with (path / "results.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path, printed = tmp_path_factory.mktemp("sweep") / "out", Console(record=True, width=200)
    with pytest.warns(RunWarning, match="seed=-1 is refused: seed must be from 0 to"):
        found = sweep_into(path, SETTINGS, load, printed)
    return found, printed.export_text()


def test_a_sweep_says_how_many_trials_programs_and_trials_at_once(swept):
    assert "6 trials, 1 refused: 1 program for 5 (5 at once)" in swept[1]
    assert re.search(r"trial rounds 10/20 .*\n.*trial rounds 20/20", swept[1])


def test_a_trial_is_the_run_of_its_own(swept, tmp_path):
    """Oracle: the runner. Counts are equal, numbers in float32; report, times and lock are the sweep's."""
    setting = SETTINGS[1]
    run(load(setting), tmp_path / "alone", False, Console(quiet=True))
    own = swept[0].path / folder_name(setting)
    more = {"report.html", "times.jsonl", ".lock"}
    assert {p.name for p in own.iterdir()} | more == {p.name for p in (tmp_path / "alone").iterdir()}
    for line, expected in zip(read_metrics(own), read_metrics(tmp_path / "alone"), strict=True):
        for name, value in expected.items():
            assert line[name] == near(value, 2e-3), name
    summary, alone = read_summary(own), read_summary(tmp_path / "alone")
    assert summary["total_uplink_bits"] == alone["total_uplink_bits"]
    assert summary["partition_hash"] == alone["partition_hash"]
    assert summary["initial_accuracy"] == pytest.approx(alone["initial_accuracy"], abs=0.01)


def test_a_trial_can_be_gone_on_with_as_a_run(swept, tmp_path):
    """Oracle: its last round, once more from the same checkpoint."""
    path = shutil.copytree(swept[0].path / folder_name(SETTINGS[0]), tmp_path / "trial")
    summary = run(config("rounds=6", "engine.eval_every=2", *overrides(SETTINGS[0])), path, True, Console(quiet=True))
    assert summary["rounds"] == 6


def test_results_have_a_row_for_each_trial(swept):
    """Oracle: the trials' own summaries."""
    found = rows(swept[0].path)
    assert [row["trial"] for row in found] == [folder_name(setting) for setting in SETTINGS]
    assert [row["status"] for row in found] == ["ended"] * 4 + ["diverged", "refused"]
    for row, setting in zip(found[:5], SETTINGS, strict=False):
        summary = read_summary(swept[0].path / row["trial"])
        assert float(row["final_accuracy"]) == summary["final_accuracy"]
        assert int(row["total_uplink_bits"]) == summary["total_uplink_bits"]
        assert row["control.keep_ratio"] == str(setting.get("control.keep_ratio", ""))


def test_what_has_ended_is_kept_and_what_has_not_goes_on(swept, tmp_path):
    """Oracle: the sweep that was never stopped. One trial is gone, one stands at round 2, one has lost its summary."""
    path = shutil.copytree(swept[0].path, tmp_path / "out")
    gone, half, torn = (path / folder_name(setting) for setting in SETTINGS[:3])
    shutil.rmtree(gone)
    shutil.rmtree(half / "checkpoints" / "4")
    (half / "summary.json").unlink()
    (torn / "summary.json").unlink()
    kept = (path / folder_name(SETTINGS[3]) / "metrics.jsonl").stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        sweep_into(path, SETTINGS, load, Console(quiet=True))
    assert (path / folder_name(SETTINGS[3]) / "metrics.jsonl").stat().st_mtime_ns == kept
    for row, expected in zip(rows(path), rows(swept[0].path), strict=True):
        for name, value in expected.items():
            assert row[name] == value or float(row[name]) == pytest.approx(float(value), rel=1e-4), name


def test_other_data_or_another_configuration_stop_a_sweep_before_anything_is_run(swept, tmp_path):
    path = shutil.copytree(swept[0].path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"local.steps must be 2 as in .*config.yaml.*, got 3"):
        sweep_into(
            path,
            SETTINGS[:1],
            lambda setting: config(*SHORT, "local.steps=3", *overrides(setting)),
            Console(quiet=True),
        )


def test_a_sweep_of_which_nothing_can_be_run_ends_in_the_first_reason(tmp_path):
    with pytest.raises(ConfigError, match="seed must be from 0"):
        sweep_into(tmp_path / "out", [{"seed": -1}, {"seed": -2}], load, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_one_configuration_in_two_ways_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"got one for both lora.alpha=8 and lora.alpha=8.0"):
        sweep_into(tmp_path, [{"lora.alpha": 8}, {"lora.alpha": 8.0}], load, Console(quiet=True))


def test_an_interruption_loses_one_segment_at_most(swept, tmp_path, monkeypatch):
    """Oracle: the sweep that was never stopped."""
    segments = trials.Lanes.segments

    def interrupted(self, given, states, rounds):
        for number, found in enumerate(segments(self, given, states, rounds)):
            if number == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(trials.Lanes, "segments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep_into(tmp_path / "out", SETTINGS[:4], load, Console(quiet=True))
    assert {len(read_metrics(tmp_path / "out" / folder_name(setting))) for setting in SETTINGS[:4]} == {2}
    monkeypatch.undo()
    sweep_into(tmp_path / "out", SETTINGS[:4], load, Console(quiet=True))
    for row, expected in zip(rows(tmp_path / "out"), rows(swept[0].path), strict=False):
        assert row["total_uplink_bits"] == expected["total_uplink_bits"] and row["status"] == "ended"


def test_survivors_of_halving_equal_full_runs(swept, tmp_path):
    """Oracle: the sweep without it. Of four trials two are stopped after the first evaluation, and stay so."""
    path = tmp_path / "out"
    for _ in range(2):
        found = sweep_into(path, SETTINGS[:4], load, Console(quiet=True), halving=Halving("eval_loss"))
        assert sorted(found.status.values()) == ["ended", "ended", "stopped", "stopped"]
    for name, status in found.status.items():
        lines, whole = (read_metrics(folder / name) for folder in (path, swept[0].path))
        assert len(lines) == (4 if status == "ended" else 2)
        for line, expected in zip(lines, whole, strict=False):
            assert line["uplink_bits"] == expected["uplink_bits"]
            for field in ("eval_loss", "train_loss", "latency_s"):
                assert line[field] == near(expected[field], 1e-5), field
    losses = {name: read_metrics(swept[0].path / name)[1]["eval_loss"] for name in found.status}
    best = sorted(losses, key=lambda name: losses[name])[:2]
    assert {name for name, status in found.status.items() if status == "ended"} == set(best)


def test_halving_by_bits_is_the_same_on_a_second_start(swept, tmp_path):
    """Law: who is stopped does not depend on how often the sweep is started; nobody is stopped at its last round."""
    path, found = tmp_path / "out", []
    for _ in range(2):
        found.append(sweep_into(path, SETTINGS[:4], load, Console(quiet=True), halving=Halving("eval_loss", "bits")))
    assert found[0].status == found[1].status
    assert sorted(found[0].status.values()) == ["ended", "ended", "stopped", "stopped"]


def test_a_partition_that_cannot_be_drawn_refuses_its_trial_alone():
    """By hand: six clients cannot hold 500 examples each."""
    asked = [config(*SHORT, f"clients.partition.min_examples={least}") for least in (500, 1, 2)]
    groups, refused = grouped(asked)
    assert [group.places for group in groups] == [[1, 2]] and list(refused) == [0]
    groups, refused = grouped([asked[1], asked[0]])
    assert [group.places for group in groups] == [[0]] and list(refused) == [1]


def test_a_sweep_in_python_equals_single_runs():
    """Oracle: `Simulation.run`. Trials of two structures, of different cohorts, in one table."""
    settings = [{"seed": 3}, {"seed": 4}, {"clients.per_round": 3, "rounds": 2}]
    found = fl.sweep(config(*SHORT), settings)
    assert found.metrics.eval_accuracy.shape == (3, 4) and list(found.rounds) == [4, 4, 2]
    assert found.status == ["ended"] * 3
    named = dataclasses.replace(found, settings=[{"lora.targets": ["query"]}, {"lora.targets": ["query", "up"]}, {}])
    columns = named.numpy()
    assert columns["lora.targets"][0] == ["query"] and columns["lora.targets"][4] == ["query", "up"]
    assert columns["round"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2] and columns["eval_loss"].dtype == float
    seeds = [{"seed": number} for number in range(3)]
    stopped = dataclasses.replace(found, settings=seeds, status=["ended", "ended", "stopped"])
    (row,) = stopped.mean("eval_accuracy")
    assert row["trials"] == 2 and row["mean"] == pytest.approx(found.last("eval_accuracy")[:2].mean())
    for trial, setting in enumerate(settings):
        sim = simulation(*SHORT, *overrides(setting))
        rounds = setting.get("rounds", 4)
        _, metrics = sim.run(sim.init(jax.random.key(setting.get("seed", 0))), rounds)
        np.testing.assert_array_equal(found.metrics.uplink_bits[trial, :rounds], metrics.uplink_bits)
        np.testing.assert_allclose(found.metrics.train_loss[trial, :rounds], metrics.train_loss, rtol=1e-3)
    assert np.isnan(found.metrics.train_loss[2, 2:]).all() and not found.metrics.uplink_bits[2, 2:].any()
    (both, third) = found.mean("train_loss")
    losses = [float(found.metrics.train_loss[trial, 3]) for trial in (0, 1)]
    assert both["mean"] == pytest.approx(np.mean(losses)) and both["deviation"] == pytest.approx(np.std(losses, ddof=1))
    assert both["trials"] == 2 and third["trials"] == 1 and np.isnan(third["deviation"])
    table = found.numpy()
    assert len(table["round"]) == 10 and set(table["trial"]) == {0, 1, 2} and np.isnan(table["clients.per_round"][0])


def test_a_network_alone_is_that_of_a_run():
    """Oracle: a run under `fixed`, whose decisions no training moves: bits, latency and energy of its rounds."""
    found = fl.sweep_network(config(), {"wireless.power_dbm": [10.0, 20.0], "seed": [0, 1]}, rounds=6)
    for trial, setting in enumerate(found.settings):
        sim = simulation(*overrides(setting))
        _, metrics = sim.run(sim.init(jax.random.key(setting["seed"])), 6)
        own = jax.tree.map(lambda leaf, trial=trial: leaf[trial], found.rounds)
        np.testing.assert_allclose(own.latency_s, metrics.latency_s, rtol=1e-4)
        np.testing.assert_allclose(own.energy_j, metrics.energy_j, rtol=1e-4)
        np.testing.assert_allclose(own.uplink_bits, metrics.uplink_bits, rtol=1e-6)
        np.testing.assert_array_equal(own.heard, metrics.participants)
