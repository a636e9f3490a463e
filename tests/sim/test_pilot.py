"""What a pilot measures, against finite differences, a NumPy loop over clients and the identity of the two errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.data.batches import hold_out
from fedjax_lora.lora.adapters import rank_mask
from fedjax_lora.prng import round_keys
from fedjax_lora.sim import pilot
from fedjax_lora.sim.round import choose_cohort, normalised, sparsify, train_locally
from fedjax_lora.strategies import Decision
from toy import simulation


@pytest.fixture(scope="module")
def toy():
    """A simulation, a state with b not 0, as after a few rounds, and a sample."""
    sim = simulation()
    state = sim.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(2), len(state.adapters.modules))
    modules = {
        name: dataclasses.replace(f, b=0.1 * rank_mask(3, 4)[:, None] * jax.random.normal(key, f.b.shape))
        for key, (name, f) in zip(keys, state.adapters.modules.items(), strict=True)
    }
    state = dataclasses.replace(state, adapters=dataclasses.replace(state.adapters, modules=modules))
    return sim, state, pilot.sample_of(sim.world, sim.parts, jax.random.key(1))


@pytest.fixture(scope="module")
def measured(toy):
    """Pilots of one round at ranks 1 and 3."""
    sim, state, sample = toy
    run = jax.jit(pilot.make_pilot(sim.parts, sim.full_gradient, 1))
    return {rank: jax.device_get(run(sim.world, sample, state, jnp.float32(rank))) for rank in (1, 3)}


@pytest.fixture(scope="module")
def trained(toy):
    """The cohort of the state's next round at rank 3, trained, its weights, and what it sends of two ranks."""
    sim, state, _ = toy

    def train(world, state):
        keys = round_keys(state.key, state.round)
        cohort = choose_cohort(sim.parts, world, state, keys)
        local = train_locally(sim.parts, world, state, cohort)
        decision = Decision(jnp.full(local.active.shape, 2 / 3), jnp.zeros(local.active.shape))
        sent, _ = sparsify(sim.parts, cohort, local, decision, keys.sparsify)
        return cohort, local, normalised(local.weight * local.active), sent.bits

    return jax.jit(train)(sim.world, pilot.at_rank(state, jnp.float32(3)))


def test_the_gradient_is_by_the_weights_themselves(toy):
    """Oracle: central differences of the loss along the gradient of one module, by moving the frozen weights."""
    sim, state, sample = toy
    loss = jax.jit(sim.full_gradient)
    value, gradient = loss(sim.world.base, sample, state.adapters, state.hyper)
    by_score, _ = jax.jit(sim.score)(sim.world.base, sample, state.adapters, state.hyper)
    np.testing.assert_allclose(value, by_score, rtol=1e-5)
    along = gradient.modules["up"] / jnp.linalg.norm(gradient.modules["up"])

    def moved(step):
        layers = sim.world.base["layers"]
        up = {**layers["up"], "w": layers["up"]["w"] + step * along}
        base = {**sim.world.base, "layers": {**layers, "up": up}}
        return float(loss(base, sample, state.adapters, state.hyper)[0])

    slope = (moved(0.05) - moved(-0.05)) / 0.1
    np.testing.assert_allclose(jnp.vdot(gradient.modules["up"], along), slope, rtol=0.02)


def test_the_ideal_movement_is_the_average_of_the_clients_products(toy, trained):
    """Oracle: NumPy, one client after the other, in float64."""
    state = toy[1]
    cohort, local, weights, _ = trained
    mask, scale = np.asarray(rank_mask(3, 4)), 16 / 3
    found = pilot._average_movement(cohort, local, weights, jnp.asarray(mask), jnp.float32(scale))
    for name, old in state.adapters.modules.items():
        new = local.trained.adapters.modules[name]
        before = (np.float64(old.a) * mask) @ np.float64(old.b)
        after = [(np.float64(a) * mask) @ np.float64(b) for a, b in zip(new.a, new.b, strict=True)]
        expected = scale * (np.einsum("c,clio->lio", np.float64(weights), np.array(after)) - before)
        np.testing.assert_allclose(found.modules[name], expected, atol=1e-4 * np.abs(expected).max())


def test_with_everything_sent_what_the_server_misses_is_the_covariance(toy, trained):
    """Oracle: the identity `ideal - server = s Cov`; the aggregator reports its norm, from Gram matrices."""
    sim, state, sample = toy
    state = pilot.at_rank(state, jnp.float32(3))
    after, step = jax.jit(lambda s: pilot._measure(sim.parts, sim.full_gradient, sim.world, sample, s))(state)
    cohort, local, weights, _ = trained
    mask, scale = rank_mask(3, 4), 16 / 3
    ideal = pilot._average_movement(cohort, local, weights, mask, jnp.float32(scale))
    server = pilot._movement(state.adapters, after.adapters, {}, mask, jnp.float32(scale))
    missed = sum(np.sum((np.float64(ideal.modules[n]) - np.float64(server.modules[n])) ** 2) for n in ideal.modules)
    np.testing.assert_allclose(step.covariance[-1], missed, rtol=1e-3)
    assert step.sparsification[-1] < 1e-4 * step.sparsification[1]


def test_a_pilot_measures_in_the_range_of_each_number(measured):
    for rank, found in measured.items():
        assert 0 < found.measured.share <= 1
        assert 0 <= found.measured.against_sparsification <= 1 and 0 <= found.measured.against_covariance <= 1
        assert found.measured.step > 0 and found.measured.movement > 0
        assert found.loss.shape == (3,) and found.measured.gap == found.loss[0]
        # Nothing is left out beyond the rank, and each rank fewer leaves out more.
        assert (np.diff(found.tail_energy) <= 1e-6).all()
        np.testing.assert_allclose(found.tail_energy[:, rank:], 0, atol=1e-6)
        np.testing.assert_allclose(np.diff(found.payload_bits[rank:]), 0)
        np.testing.assert_allclose(found.weights.sum(), 1, rtol=1e-5)


def test_payloads_are_what_the_sparsifier_sends(trained, measured):
    """Oracle: the bits counted of a cohort's uploads, of whose three ranks two are kept."""
    cohort, _, _, bits = trained
    np.testing.assert_array_equal(bits, measured[3].payload_bits[2])
    np.testing.assert_array_equal(cohort.downlink_bits, measured[3].downlink_bits)


def test_held_out_examples_are_nobodys_any_more(toy):
    """Oracle: sets of rows."""
    data = toy[0].world.data
    kept = hold_out(data, 10)

    def rows(d):
        return [set(np.asarray(own)[:count].tolist()) for own, count in zip(d.index, d.count, strict=True)]

    before, after = rows(data), rows(kept)
    assert all(new <= old and len(old) - len(new) == len(old) // 10 for old, new in zip(before, after, strict=True))
    held = sorted(set.union(*before) - set.union(*after))
    assert len(kept.test["label"]) == len(held) > 0
    labels = np.bincount(np.asarray(data.train["label"])[held], minlength=10)
    np.testing.assert_array_equal(np.bincount(np.asarray(kept.test["label"]), minlength=10), labels)


def test_holding_out_needs_enough_examples(toy):
    data = dataclasses.replace(toy[0].world.data, count=jnp.ones(6, jnp.int32))
    with pytest.raises(ValueError, match="clients must hold 10 examples"):
        hold_out(data, 10)
