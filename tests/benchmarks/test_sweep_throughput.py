"""The benchmark of sweeps at toy size: the trials are those of `fl.sweep`, and the JSON's own arithmetic."""

import json
import sys

import numpy as np
import pytest

import fedjax_lora as fl
from fedjax_lora.config.presets import preset

TINY = ["clients.count=4", "local.steps=1", "pretrain.steps=1", "rounds=2", "engine.eval_every=2"]


def test_its_trials_are_those_of_a_sweep(benchmark):
    """Oracle: `fl.sweep` and `fl.sweep_network` of the same seeds."""
    module = benchmark("sweep_throughput")
    config, of = fl.load_config(None, TINY, base=preset("digits")), module.group(TINY, 2)
    expected = fl.sweep(config, over={"seed": [0, 1]}).metrics
    (found,) = module.training(of, 2, 2).run()
    losses = [np.asarray(metrics.train_loss) for metrics in found]
    np.testing.assert_allclose(losses, expected.train_loss, rtol=1e-5)
    alone = fl.sweep_network(config, over={"seed": [0, 1]}, rounds=3).rounds
    np.testing.assert_allclose(module.network(of, 2, 3).run().latency_s, alone.latency_s, rtol=1e-5)


def test_rates_and_ratios_add_up(benchmark, monkeypatch, tmp_path, capsys):
    """The JSON's own arithmetic."""
    module, out = benchmark("sweep_throughput"), tmp_path / "out.json"
    monkeypatch.setattr(module, "NETWORK", ["clients.count=4", "pretrain.steps=1"])
    given = ["x", "--at-once", "2", "1", "--network-rounds", "2", "--parts", "fixed", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--out", str(out)])
    module.main()
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    one, two = found["parts"]["network, fixed"]["rows"]
    assert (one["at_once"], two["at_once"], one["ratio"]) == (1, 2, 1.0)
    assert two["ratio"] == pytest.approx(two["trials_per_s"]["median"] / one["trials_per_s"]["median"])
