"""A sampled population: whom a round trains on what, and that its size changes nothing but who is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_lora.core.keys import round_keys
from fedjax_lora.sim.evaluate import SCORED, scored_clients
from fedjax_lora.sim.selection import draw_channel, seen_alone

POPULATION = ("clients.partition={kind: sampled, examples: 6}", "clients.count=50", "clients.per_round=3")


def test_a_sampled_population_runs_as_its_own_table_does():
    """Oracle: the same rows in a table, by the same program."""
    sim = toy.simulation(*POPULATION)
    data = sim.world.data
    table = dataclasses.replace(data, index=data.index[jnp.arange(50)])
    state = sim.init(jax.random.key(0))
    segment = jax.jit(sim.program.segment)
    (found, rows, scores), (expected, *told) = (
        segment(dataclasses.replace(sim.world, data=of), state, jnp.int32(2)) for of in (data, table)
    )
    jax.tree.map(np.testing.assert_array_equal, found.adapters, expected.adapters)
    np.testing.assert_array_equal(rows.uplink_bits, told[0].uplink_bits)
    np.testing.assert_array_equal(scores.more["worst_tenth_accuracy"], told[1].more["worst_tenth_accuracy"])
    assert rows.uplink_bits.shape == (3,) and rows.client_uplink_bits.shape == (3, 3)


def test_no_array_is_of_clients_and_rows():
    """By shapes: what is kept of each of a million clients takes 24 bytes, and has no second axis."""
    sim = toy.simulation(*POPULATION[:1], "clients.count=1000000", "clients.per_round=3")
    state = jax.eval_shape(sim.program.start, jax.random.key(0), sim.numbers)
    of_clients = [leaf for leaf in jax.tree.leaves((sim.world.data, state)) if leaf.shape[:1] == (1_000_000,)]
    assert all(leaf.shape == (1_000_000,) for leaf in of_clients)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in of_clients) == 24_000_000
    rows, count = scored_clients(sim.world.data)
    assert rows.shape == (SCORED, 6) and count.shape == (SCORED,)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_round_draws_the_channels_of_its_cohort_or_of_all(correlation):
    """Oracle: a step of all clients; without a memory of the fading those who are not seen keep what they had."""
    sim = toy.simulation("clients.per_round=3", f"wireless.fading_correlation={correlation}")
    parts, state = toy.parts(sim), sim.init(jax.random.key(0))
    keys = round_keys(state.key, state.round)
    ids = seen_alone(parts, state, keys)
    assert ids is not None
    found, every, before = (
        np.asarray(one.methods["wireless"].fading)
        for one in (draw_channel(parts, state, keys.channel, ids), draw_channel(parts, state, keys.channel), state)
    )
    assert (every != before).all()
    seen = np.isin(np.arange(6), ids) | (correlation > 0)
    np.testing.assert_allclose(found[seen], every[seen], rtol=1e-5)
    np.testing.assert_array_equal(found[~seen], before[~seen])
