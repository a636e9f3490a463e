"""Rounds that add one update after the other to the average, against those that hold all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core import trees
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.sim.cohort import device_mesh, sum_over_devices
from oracles.processes import WAITING
from toy import simulation

ONE_BY_ONE = "engine.error_norms=false"
SGD = "local.optimizer={name: sgd, learning_rate: 0.05}"
CASES = [
    ["sparsifier=soft"],
    ["sparsifier=random_rank", "wire.bits=8", "engine.client_chunk=4"],
    ["sparsifier={name: soft, send: change, error_feedback: true}", "wireless.fade_threshold=0.4"],
    ["aggregation=hetlora", "lora.client_ranks=[1, 2, 3]", "sparsifier=dense"],
    ["aggregation=fedsa", "sparsifier=dense"],
]


def run(*overrides, rounds=3):
    sim = simulation(SGD, *overrides)
    return sim.run(sim.init(jax.random.key(2)), rounds)


@pytest.mark.parametrize("case", CASES, ids=["soft", "random_rank", "feedback", "hetlora", "fedsa"])
def test_a_run_is_that_of_all_at_once_but_for_the_error_norms(case):
    """Invariance, to the order of float32's sums: messages are the same, drawn numbers included."""
    (expected, whole), (found, metrics) = run(*case), run(*case, ONE_BY_ONE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found.adapters, expected.adapters)
    np.testing.assert_array_equal(metrics.uplink_bits, whole.uplink_bits)
    np.testing.assert_array_equal(metrics.participants, whole.participants)
    for name in ("sparsification_error", "covariance_error"):
        assert np.isnan(getattr(metrics, name)).all() and np.isfinite(getattr(whole, name)).all()


def test_a_client_more_takes_its_adapters_and_a_fifth_more_at_most_by_the_compilers_count():
    """Oracle: the bytes of the adapters; all at once, the same program takes two copies."""

    def temporary_bytes(clients, *overrides):
        sim = simulation(f"clients.count={clients}", "sparsifier=dense", "engine.client_chunk=2", *overrides)
        state = sim.init(jax.random.key(0))
        sim.compile(state)
        analysis = sim.program.compiled(sim.world, state).memory_analysis()
        return analysis.temp_size_in_bytes, trees.num_bytes(state.adapters)

    def copies(*overrides):
        (few, size), (many, _) = temporary_bytes(16, *overrides), temporary_bytes(48, *overrides)
        return (many - few) / 32 / size

    assert 0.9 < copies(ONE_BY_ONE) < 1.2 and copies() > 1.9


def test_four_devices_add_up_what_one_does(tmp_path):
    """Invariance, and the compiled program: updates cross between devices in sums alone."""
    script = """
import json, re, sys, jax, numpy as np
sys.path.insert(0, sys.argv[1])
from toy import simulation
assert jax.device_count() == 4
sim = simulation(*json.loads(sys.argv[3]))
state = sim.init(jax.random.key(2))
sim.compile(state)
text = sim.program.compiled(sim.world, state).as_text()
gathered = re.findall(r"f32\\[([\\d,]+)\\]\\S* all-gather", text)
state, metrics = sim.run(state, 3)
np.savez(sys.argv[2], *map(np.asarray, jax.tree.leaves(state.adapters)))
print(json.dumps({"sums": len(re.findall(r" all-reduce(?:-start)?\\(", text)), "gathered": gathered}))
"""
    out, settings = tmp_path / "four.npz", [SGD, ONE_BY_ONE, "clients.count=8", "sparsifier=soft"]
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(out), json.dumps(settings)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", **WAITING}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout
    program = json.loads(printed.splitlines()[-1])
    assert program["sums"] > 0
    assert not [shape for shape in program["gathered"] if shape.count(",") > 1]  # scalars of the clients alone
    expected, _ = run(*settings[1:])
    with np.load(out) as saved:
        for x, name in zip(jax.tree.leaves(expected.adapters), saved.files, strict=True):
            np.testing.assert_allclose(x, saved[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_sums_over_items_are_numpys(most):
    """12 items at 1, 3, 4 and 12 at once."""
    w, items = np.random.default_rng(0).normal(size=(4, 3)), np.random.default_rng(1).normal(size=(12, 4))
    found = sum_over_devices(
        lambda w, x: {"y": x @ w, "n": jnp.int32(1)}, jnp.asarray(w), jnp.asarray(items), most, device_mesh()
    )
    np.testing.assert_allclose(found["y"], (items @ w).sum(0), rtol=1e-4, atol=1e-5)
    assert found["n"] == 12


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["aggregation=flora"], "engine.error_norms must be true where aggregation.name is flora, got False"),
        (
            ["arrival={name: buffered, buffer: 2}", "sparsifier=dense", "control=ideal"],
            "engine.error_norms must be true where arrival.name is buffered, got False",
        ),
        (
            ["engine.reproducible=true", "engine.client_chunk=2"],
            "engine.error_norms must be true where reproducible is true, got False",
        ),
    ],
)
def test_what_takes_all_updates_at_once_is_refused_in_one_line(overrides, line):
    with pytest.raises(ConfigError) as refused:
        simulation(ONE_BY_ONE, *overrides)
    assert str(refused.value) == line
