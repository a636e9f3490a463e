"""Trials side by side. Oracle: each as a single run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.config.catalogue import METHODS
from fedjax_lora.config.groups import grouped
from fedjax_lora.core import memory as machine
from fedjax_lora.sim import trials
from fedjax_lora.sim.trials import Lanes, lanes_bytes, trials_at_once, unstacked
from oracles.method_settings import SETTINGS
from toy import config, simulation

FACTORS = 1.0, 0.96, 0.92
SEEDS = 3, 3, 4


def varied(numbers, by):
    """All numbers at once; a 0 becomes a little more, and a rank stays whole."""
    moved = {key: np.where(value == 0, 1.0 - by, value * by) for key, value in numbers.items()}
    moved["lora.rank"] = numbers["lora.rank"] - (by < 0.95)
    if "lora.client_ranks" in numbers:
        moved["lora.client_ranks"] = np.minimum(numbers["lora.client_ranks"], moved["lora.rank"])
    return {key: np.asarray(value, np.float32) for key, value in moved.items()}


def test_every_method_is_in_the_settings():
    """Oracle: the catalogue."""
    made = [config(*overrides) for overrides in SETTINGS.values()]
    for slot in ("sparsifier", "aggregation", "control", "arrival", "drift", "server", "training"):
        every = {method.name for method in METHODS if method.slot == slot}
        assert every == {getattr(one, slot).name for one in made}


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=list(SETTINGS))
def test_three_trials_of_all_numbers_and_two_seeds_equal_three_single_runs(overrides):
    """Participants and bits to the last, losses and latencies in float32."""
    configs = [config("rounds=2", "engine.eval_every=2", f"seed={seed}", *overrides) for seed in SEEDS]
    (group,), refused = grouped(configs)
    assert not refused
    sim = group.simulation
    each = [trial._replace(numbers=varied(trial.numbers, by)) for trial, by in zip(group.trials, FACTORS, strict=True)]
    lanes = Lanes(sim, 3)
    *_, (states, found) = lanes.segments(each, lanes.init(each), 2)
    for trial, metrics, state in zip(each, found, unstacked(states), strict=True):
        data = dataclasses.replace(sim.world.data, index=trial.rows, count=trial.examples)
        first = sim.program.init(jax.random.key(trial.seed), trial.numbers)
        world = jax.device_put(dataclasses.replace(sim.world, data=data), sim.program.everywhere)
        after, rows, scores = sim.program.compiled(world, first)(world, first, jnp.int32(2))
        for name in ("participants", "outages", "uplink_bits", "downlink_bits"):
            np.testing.assert_array_equal(getattr(metrics, name), getattr(rows, name))
        for name in ("train_loss", "latency_s", "energy_j", "queue_s", "kept_ranks_mean"):
            np.testing.assert_allclose(getattr(metrics, name), getattr(rows, name), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(metrics.eval_loss[-1], scores.loss, rtol=2e-3)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-4), state.adapters, after.adapters
        )
        np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(after.key))
    if "ideal" not in str(overrides):
        assert len({float(metrics.latency_s[0]) for metrics in found}) == 3  # the values make a difference


def test_configurations_are_grouped_by_structure():
    """Oracle: enumeration. Numbers, seeds and partitions are of one structure; a count of clients is not."""
    asked = [
        "seed=1",
        "control.keep_ratio=0.3",
        "clients.count=5",
        "clients.partition.alpha=3.0",
        "wireless.power_dbm=9",
    ]
    groups, refused = grouped([config(override) for override in asked])
    assert [group.places for group in groups] == [[0, 1, 3, 4], [2]] and not refused
    assert {trial.rows.shape for trial in groups[0].trials} == {groups[0].trials[0].rows.shape}
    assert len({facts.partition_hash for facts in groups[0].facts}) == 3


def test_base_and_pools_have_no_trial_axis():
    """Structure: of the lowered program's arguments, those of the base and of the examples have their own shapes."""
    (group,), _ = grouped([config(f"seed={seed}") for seed in (1, 2, 3, 4)])
    lanes = Lanes(group.simulation, 4)
    states = jax.eval_shape(lanes.init, group.trials)
    lowered = lanes.lower(jax.eval_shape(lambda: lanes.stacked(group.trials)), states)
    (world, state, _), _ = lowered.in_avals
    own = group.simulation.world

    def shapes(tree):
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    assert shapes(world.base) == shapes(own.base)
    assert shapes((world.data.train, world.data.test)) == shapes((own.data.train, own.data.test))
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves((state, world.data.index, world.data.count)))


@pytest.mark.parametrize(
    ("trials_asked", "at_once", "expected"), [(10, 8, 5), (8, 8, 8), (7, 3, 3), (3, 5, 3), (1, 1, 1)]
)
def test_batches_are_of_one_size(trials_asked, at_once, expected):
    """By hand: 10 trials where 8 fit are two batches of 5."""
    assert trials_at_once(simulation(f"engine.trials_at_once={at_once}"), trials_asked) == expected


def test_as_many_trials_at_once_as_memory_holds(monkeypatch):
    """Oracle: the largest number whose foreseen bytes fit; one where none does."""
    sim = simulation()
    for fitting in (1, 3, 5):
        enough = lanes_bytes(sim.needs, sim.layout, fitting) / trials.MEMORY_SHARE
        monkeypatch.setattr(machine, "available_bytes", lambda enough=enough: enough * 1.001)
        assert trials_at_once(sim, 5) in (fitting, -(-5 // -(-5 // fitting)))
    monkeypatch.setattr(machine, "available_bytes", lambda: 1.0)
    assert trials_at_once(sim, 5) == 1


def test_more_trials_at_once_than_memory_holds_are_refused(monkeypatch):
    """By hand: one line with the field, what is foreseen and what is at hand."""
    sim = simulation("engine.trials_at_once=5")
    needed = lanes_bytes(sim.needs, sim.layout, 5)
    monkeypatch.setattr(machine, "available_bytes", lambda: 1.01 * needed)
    assert trials_at_once(sim, 5) == 5
    monkeypatch.setattr(machine, "available_bytes", lambda: 0.99 * needed)
    with pytest.raises(ValueError, match=r"engine.trials_at_once must be less, or auto, .*: 5 trials take .*, got 5"):
        trials_at_once(sim, 8)


def test_a_trial_that_diverges_harms_no_other():
    """Invariance: the others' metrics are those beside a trial that does not, to the bit."""
    (group,), _ = grouped([config("rounds=2", "engine.eval_every=2", f"seed={seed}") for seed in (1, 2)])
    lanes, (first, second) = Lanes(group.simulation, 2), group.trials
    wild = second._replace(numbers=second.numbers | {"local.optimizer.learning_rate": np.float32(1e30)})
    (_, calm), (_, beside) = (
        list(lanes.segments(each, lanes.init(each), 2))[-1] for each in ((first, second), (first, wild))
    )
    assert beside[1].nonfinite_clients.sum() > 0
    jax.tree.map(np.testing.assert_array_equal, beside[0], calm[0])
