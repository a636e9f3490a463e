"""The network alone, against a Python loop over its own records and against the run's own rounds."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.control import FixedConfig, TsfaConfig, fixed, tsfa_online
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.learning import Work
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Observation, Outcome
from fedjax_lora.sim import network
from fedjax_lora.wireless.cell import WirelessConfig, make

CLIENTS, COHORT, ROUNDS, RANKS = 7, 3, 5, 2
CONTEXT = Context(num_clients=CLIENTS, cohort_size=COHORT)
WORK = Work(samples=jnp.array([8.0, 16.0, 24.0, 32.0, 8.0, 16.0, 24.0]))
BITS = jnp.tile(jnp.array([1e6, 1e6, 2e6]), (COHORT, 1))


def cell(**options):
    """A network, its state, and `rounds` draws of it."""
    wireless = make(WirelessConfig(**options), CONTEXT)
    return wireless, wireless.init(jax.random.key(0), jnp.arange(CLIENTS))


def draw(wireless, state, key, **sizes):
    sizes = {"rounds": ROUNDS, "cohort_size": COHORT} | sizes
    run = jax.jit(lambda state, key: network.draw_channel(wireless, WORK, state, key, jnp.float32(3e6), **sizes))
    return run(state, key)


@pytest.mark.parametrize("downlink", [False, True])
def test_rounds_are_steps_of_the_network_by_the_keys_of_a_run(downlink):
    """Oracle: a Python loop over step and observe; cohorts are the highest of uniform numbers keyed by the clients."""
    (wireless, state), key = cell(downlink=downlink, fading_correlation=0.5), jax.random.key(1)
    drawn, seen = draw(wireless, state, key), set()
    for number in range(ROUNDS):
        keys = round_keys(key, jnp.int32(number))
        state = wireless.step(state, keys.channel, jnp.arange(CLIENTS))
        tickets = np.asarray(jax.vmap(jax.random.uniform)(client_keys(keys.cohort, jnp.arange(CLIENTS))))
        ids = np.sort(np.argsort(-tickets)[:COHORT])
        np.testing.assert_array_equal(drawn.ids[number], ids)
        seen |= set(ids.tolist())
        cohort, work = jax.tree.map(lambda leaf, ids=ids: leaf[ids], (state, WORK))
        expected = wireless.observe(cohort, work, jnp.full(COHORT, 3e6), jnp.ones(COHORT, bool))
        own = jax.tree.map(lambda leaf, number=number: leaf[number], drawn.radio)
        jax.tree.map(lambda found, value: np.testing.assert_allclose(found, value, rtol=1e-5), own, expected)
    assert drawn.present.all() and len(seen) > COHORT


def test_padding_is_absent_and_changes_nobody_else():
    """Invariance."""
    (wireless, state), key = cell(), jax.random.key(1)
    alone, padded = draw(wireless, state, key), draw(wireless, state, key, size=COHORT + 2)
    np.testing.assert_array_equal(padded.present.sum(1), COHORT)
    for x, y in zip(alone.radio[:2], padded.radio[:2], strict=True):
        np.testing.assert_allclose(x, y[:, :COHORT], rtol=1e-6)
    np.testing.assert_array_equal(padded.radio.start_s[:, COHORT:], 0)


def observed(drawn):
    return Observation(
        radio=drawn.radio,
        weights=jnp.full(COHORT, 1 / COHORT),
        rank=jnp.full(COHORT, float(RANKS)),
        tail_energy=jnp.tile(jnp.array([3.0, 1.0, 0.0]), (COHORT, 1)),
        bits=BITS,
    )


def row(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def test_play_is_a_loop_over_allocate_and_update():
    """Oracle: the controller called round by round, with the outcome that it planned."""
    (wireless, state), control = cell(), tsfa_online.make(TsfaConfig(V=0.5, latency_budget_s=0.2, queue_s=1.0))
    drawn = draw(wireless, state, jax.random.key(2))
    end, played = jax.jit(lambda drawn: network.play(control, control.init(), drawn, observed))(drawn)
    allocate, queues = jax.jit(control.allocate), control.init()
    for number in range(ROUNDS):
        decision = allocate(queues, observed(row(drawn, number)))
        queues, report = control.update(queues, Outcome(decision.latency_s, jnp.float32(0)))
        for found, value in zip(row(played.decision, number), decision, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-4)
        np.testing.assert_allclose(played.report["queue_s"][number], report["queue_s"], rtol=1e-4)
    np.testing.assert_allclose(end["queue_s"], queues["queue_s"], rtol=1e-4)
    assert 1 < played.decision.kept.mean() < RANKS  # the queue does decide something


def test_what_is_delivered_is_the_networks_own():
    """Oracle: `Wireless.deliver` and NumPy; with shares of least latency all uploads of a round end together.

    A client that cannot be heard is not waited for.
    """
    (wireless, state), control = cell(fade_threshold=0.3), fixed.make(FixedConfig(keep_ratio=0.5), CONTEXT)
    drawn = draw(wireless, state, jax.random.key(3))

    def outcome(drawn, decision):
        return network.delivered(wireless, drawn, BITS[:, 1], decision)[1]

    _, played = jax.jit(lambda drawn: network.play(control, control.init(), drawn, observed, outcome))(drawn)
    assert (drawn.radio.snr_hz == 0).any()
    for number in range(ROUNDS):
        here, share_hz = row(drawn, number), played.decision.share_hz[number]
        delivery = wireless.deliver(here.state, here.work, BITS[:, 1], share_hz, here.radio.start_s, here.present)
        ends = np.asarray(delivery.latency_s)
        heard = ends[np.isfinite(ends)]
        assert len(heard) == (np.asarray(here.radio.snr_hz) > 0).sum()
        np.testing.assert_allclose(heard, played.outcome.latency_s[number] if len(heard) else [], rtol=1e-4)
        np.testing.assert_allclose(played.outcome.energy_j[number], np.mean(delivery.energy_j), rtol=1e-5)


def test_only_what_is_kept_is_returned():
    """By definition."""
    (wireless, state), control = cell(), fixed.make(FixedConfig(keep_ratio=0.5), CONTEXT)
    drawn = draw(wireless, state, jax.random.key(2))
    _, kept = network.play(control, (), drawn, observed, keep=lambda drawn, played: played.decision.kept.sum())
    np.testing.assert_array_equal(kept, np.full(ROUNDS, COHORT * 0.5 * RANKS))


def test_the_example_runs():
    """Oracle: what the docstring says."""
    assert doctest.testmod(network).failed == 0
