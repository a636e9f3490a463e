"""Corrections of drift: FedProx against autodiff, SCAFFOLD against its algorithm written as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_lora.adapters.lora import effective, rank_mask
from fedjax_lora.core import trees
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.network import Decision
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.data.batches import gather, local_batches
from fedjax_lora.sim.round import control, importance, sparsify, train_locally
from fedjax_lora.sim.selection import choose_cohort
from fedjax_lora.tasks.classification import cross_entropy
from fedjax_lora.training.corrections import FedProxConfig, ScaffoldConfig, fedprox, scaffold
from oracles.contexts import context
from oracles.sparsifier_oracle import random_adapters
from oracles.sparsifier_oracle import rank_mask as numpy_mask
from toy import simulation

SETTINGS = ("sparsifier.name=dense", "local.optimizer.name=sgd", "local.optimizer.learning_rate=0.1")


def assert_close(x, y, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), x, y)


def test_fedprox_adds_the_gradient_of_its_term():
    """Oracle: autodiff of `mu / 2 ||adapters - start||^2`."""
    gradient, adapters, start = (random_adapters(seed) for seed in (0, 1, 2))

    def term(adapters):
        squares = jax.tree.map(lambda x, x0: jnp.sum((x - x0) ** 2), adapters, start)
        return 0.3 / 2 * sum(jax.tree.leaves(squares))

    found = fedprox(FedProxConfig(mu=0.3), context()).gradient(gradient, adapters, start, (), ())
    assert_close(found, jax.tree.map(jnp.add, gradient, jax.grad(term)(adapters)))


@pytest.fixture(scope="module")
def two_rounds():
    """A toy run with SCAFFOLD in which all clients take part: its state at the start and after each of two rounds."""
    sim = simulation("drift.name=scaffold", *SETTINGS)
    states = [sim.init(jax.random.key(3))]
    for _ in range(2):
        state, metrics = sim.run(states[-1], 1)
        states.append(state)
    return sim, states, metrics


def scaffold_round(sim, state):
    """One round of Karimireddy et al., algorithm 1 with option II, as a loop over clients and steps.

    Returns the average, the clients' control variates and the server's.
    """
    model = toy.parts(sim).model
    data, key = sim.world.data, round_keys(state.key, state.round).local
    weight, rate, steps = np.asarray(data.count) / np.sum(data.count), 0.1, 2

    @jax.jit
    def gradient(adapters, batch, weight):
        def loss(x):
            used = effective(x, rank_mask(3, 4), 16.0 / 3)
            return cross_entropy(model.apply(sim.world.base, used, batch), batch["label"], weight)

        return jax.grad(loss)(adapters)

    mean, owns = jax.tree.map(jnp.zeros_like, state.adapters), []
    for k in range(6):
        order_key, _ = jax.random.split(jax.random.fold_in(key, k))
        rows, valid = local_batches(order_key, data.index[k], data.count[k], steps, 4)
        x, c, c_k = state.adapters, state.methods["drift"], trees.take(state.clients.methods["drift"], k)
        for step in range(steps):
            g = gradient(x, gather(data.train, rows[step]), valid[step])
            x = jax.tree.map(lambda x, g, c, c_k: x - rate * (g - c_k + c), x, g, c, c_k)
        owns.append(jax.tree.map(lambda c_k, c, x0, x: c_k - c + (x0 - x) / (steps * rate), c_k, c, state.adapters, x))
        mean = jax.tree.map(lambda m, x, w=weight[k]: m + w * x, mean, x)
    server = jax.tree.map(lambda *leaves: sum(leaves) / 6, *owns)
    return mean, jax.tree.map(lambda *leaves: jnp.stack(leaves), *owns), server


@pytest.mark.parametrize("number", [0, 1])
def test_scaffold_equals_a_loop_over_clients_and_steps(two_rounds, number):
    """From zero control variates, and from those that a round has left."""
    sim, states, _ = two_rounds
    mean, clients, server = scaffold_round(sim, states[number])
    assert_close(states[number + 1].adapters, mean)
    assert_close(states[number + 1].clients.methods["drift"], clients, rtol=1e-3, atol=1e-4)
    assert_close(states[number + 1].methods["drift"], server, rtol=1e-3, atol=1e-4)


def test_the_mean_of_all_control_variates_is_the_servers(two_rounds):
    """Conservation law, when all take part."""
    for state in two_rounds[1]:
        assert_close(
            jax.tree.map(lambda leaf: jnp.mean(leaf, 0), state.clients.methods["drift"]),
            state.methods["drift"],
            atol=1e-6,
        )
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(two_rounds[1][-1].methods["drift"])) > 1e-3


def test_scaffold_doubles_both_links(two_rounds):
    """Oracle: the same run without it."""
    plain = simulation(*SETTINGS)
    _, metrics = plain.run(plain.init(jax.random.key(3)), 1)
    np.testing.assert_array_equal(two_rounds[2].client_uplink_bits, 2 * metrics.client_uplink_bits)
    np.testing.assert_array_equal(two_rounds[2].client_downlink_bits, 2 * metrics.client_downlink_bits)


@pytest.mark.parametrize("drift", ["none", "scaffold"])
def test_control_plans_with_the_bits_that_are_sent(drift):
    """Invariance: `soft` sends as many bits as it plans, with what SCAFFOLD sends beside it."""
    sim = simulation(f"drift.name={drift}", "local.optimizer.name=sgd")

    @jax.jit
    def planned_and_sent(world, state):
        planned = []

        def allocate(state, observation):
            planned.append(observation.bits[:, 2])
            return Decision(kept=jnp.full(6, 2.0), share_hz=jnp.full(6, 1e5))

        parts, keys = toy.parts(sim), round_keys(state.key, state.round)
        parts = parts._replace(controller=parts.controller._replace(allocate=allocate))
        cohort = choose_cohort(parts, world, state, keys)
        local = train_locally(parts, world, state, cohort)
        decision = control(parts, cohort, local, importance(parts, cohort, local))
        return planned[0], sparsify(parts, cohort, local, decision.kept, keys.sparsify).bits

    planned, bits = planned_and_sent(sim.world, sim.init(jax.random.key(3)))
    np.testing.assert_array_equal(planned, bits.exact())


def test_a_control_variate_of_what_is_not_trained_stays():
    """Invariance: in a round of b alone, those of a, and of ranks that are not in use, are as they were."""
    start, trained, server, client = (random_adapters(seed) for seed in range(4))
    scope = Scope(jnp.asarray(numpy_mask()), jnp.float32(0), jnp.float32(1), jnp.float32(1))
    moved: Adapters = scaffold(ScaffoldConfig(), context()).next_client(
        start, trained, jnp.float32(0.5), scope, server, client
    )
    for name, f in moved.modules.items():
        x0, x, c, own = (part.modules[name].b[:, :4] for part in (start, trained, server, client))
        np.testing.assert_array_equal(f.a, client.modules[name].a)
        np.testing.assert_array_equal(f.b[:, 4:], client.modules[name].b[:, 4:])
        np.testing.assert_allclose(f.b[:, :4], own - c + (x0 - x) / 0.5, rtol=1e-5, atol=1e-6)
