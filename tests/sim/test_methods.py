"""Rounds of the aggregators that choose what is trained, sent and kept, and of clients of different ranks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters.lora import effective, rank_mask
from fedjax_lora.aggregation import rolora
from fedjax_lora.core import trees
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.sim.round import train_cohort
from fedjax_lora.sim.selection import sample
from fedjax_lora.tasks.classification import label_weights
from fedjax_lora.training.personal import compose, deployed
from oracles.contexts import context
from toy import clients, parts, simulation

WIDTH = {"query": (64, 64), "up": (64, 256)}


def equal(x, y):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def factor(adapters, part):
    return {name: getattr(f, part) for name, f in adapters.modules.items()}


@pytest.fixture(scope="module")
def fedsa():
    """A toy run of FedSA with half of the clients a round, and the states before, after one and after two rounds."""
    sim = simulation(
        "aggregation.name=fedsa", "sparsifier.name=dense", "clients.per_round=3", "lora.client_ranks=[3,2]"
    )
    states, rows = [sim.init(jax.random.key(3))], []
    for _ in range(2):
        state, metrics = sim.run(states[-1], 1)
        states.append(state)
        rows.append(metrics)
    return sim, states, rows


def test_fedsa_shares_a_and_leaves_b_and_head_with_the_clients(fedsa):
    """Invariance: the server's b and head, and all of a client that never took part, are those of the start."""
    _, (start, first, _), rows = fedsa
    assert equal((factor(first.adapters, "b"), first.adapters.head), (factor(start.adapters, "b"), start.adapters.head))
    assert not equal(factor(first.adapters, "a"), factor(start.adapters, "a"))
    moved = [
        k for k in range(6) if not equal(trees.take(first.clients.personal, k), trees.take(start.clients.personal, k))
    ]
    assert len(moved) == 3
    bits = sorted(sum(4 * rank * n_in * 32 for n_in, _ in WIDTH.values()) for rank in (3, 2))
    assert set(rows[0].client_uplink_bits.ravel()) <= set(bits)
    np.testing.assert_array_equal(rows[0].client_uplink_bits, rows[0].client_downlink_bits)


def test_personal_accuracy_equals_a_loop_over_clients_and_examples(fedsa):
    """Oracle: NumPy, example by example, each with the ratio of its label's shares."""
    sim, states, rows = fedsa
    state, data = states[-1], sim.world.data
    model = parts(sim).model
    label, accuracies = np.asarray(data.test["label"]), []
    for k in range(6):
        own = compose(state.adapters, trees.take(state.clients.personal, k))
        used = effective(own, rank_mask((3, 2)[k % 2], 4), 16.0 / 3)
        right = np.asarray(model.apply(sim.world.base, used, data.test)).argmax(1) == label
        mine = np.asarray(data.train["label"])[np.asarray(data.index[k])[: data.count[k]]]
        weight = np.array([np.mean(mine == y) / np.mean(label == y) for y in label])
        accuracies.append(np.sum(right * weight) / np.sum(weight))
    assert np.ptp(accuracies) > 0.01
    np.testing.assert_allclose(rows[-1].personal_accuracy[-1], np.mean(accuracies), rtol=1e-5)


def test_global_accuracy_is_of_the_mean_of_what_the_clients_keep(fedsa):
    """Oracle: NumPy's mean of b and head over all clients, those that never took part too, under the shared a."""
    sim, states, rows = fedsa
    model = parts(sim).model
    label, losses = np.asarray(sim.world.data.test["label"]), []
    for state, metrics in zip(states[1:], rows, strict=True):
        mean = jax.tree.map(lambda leaf: jnp.float32(np.mean(np.float64(leaf), axis=0)), state.clients.personal)
        b, head = mean["b"], mean["head"]
        modules = {name: f.replace(b=b[name]) for name, f in state.adapters.modules.items()}
        used = effective(state.adapters.replace(modules=modules, head=head), rank_mask(3, 4), 16.0 / 3)
        logits = np.asarray(model.apply(sim.world.base, used, sim.world.data.test), np.float64)
        losses.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(label)), label]).mean())
        np.testing.assert_allclose(metrics.eval_loss[-1], losses[-1], rtol=1e-5)
        np.testing.assert_allclose(metrics.eval_accuracy[-1], (logits.argmax(1) == label).mean(), rtol=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)  # it moves


def test_label_weights_by_hand():
    """Closed form: shares 2/3 and 1/3 of the client over 1/4, 1/4 and 1/2 of the pool; padding does not count."""
    found = label_weights(jnp.array([0, 0, 1, 2, 2]), jnp.int32(3), jnp.array([2, 0, 1, 2]), 4)
    np.testing.assert_allclose(found, [0.0, 8 / 3, 4 / 3, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("name", "server"), [("rolora", "sgd"), ("ffa", "yogi"), ("ffa", "momentum")])
def test_the_factor_at_rest_stays_whatever_the_server_optimizer(name, server):
    """Invariance to the bit, and the uplink bits of the other: RoLoRA trains b, then a; FFA never a."""
    sim = simulation(f"aggregation.name={name}", "sparsifier.name=dense", f"server.name={server}", "lora.targets=[up]")
    state = sim.init(jax.random.key(3))
    for number in range(2):
        before, (state, metrics) = state, sim.run(state, 1)
        at_rest, live = ("b", "a") if name == "rolora" and number else ("a", "b")
        assert equal(factor(state.adapters, at_rest), factor(before.adapters, at_rest))
        assert not equal(factor(state.adapters, live), factor(before.adapters, live))
        values = 4 * 3 * WIDTH["up"]["ab".index(live)] + 64 * 10 + 10
        np.testing.assert_array_equal(metrics.client_uplink_bits, 32 * values)
        down = 64 * 10 + 10
        for factor_sent in {"rolora": ("ab", "b")[number], "ffa": "b"}[name]:  # of RoLoRA: both, then what has moved
            down += 4 * 3 * WIDTH["up"]["ab".index(factor_sent)]
        np.testing.assert_array_equal(metrics.client_downlink_bits, 32 * down)
        assert metrics.covariance_error[0] == 0.0
        assert np.isnan(metrics.personal_accuracy).all()  # nothing is kept, so nothing is measured


def test_rolora_sends_what_a_client_may_not_know():
    """Oracle: the factor trained in the round before, in the order b, a, b; both where one may have missed it."""
    method = rolora.make(rolora.RoLoraConfig(), context())

    def received(number, everyone):
        return tuple(map(float, method.traffic(jnp.int32(number), everyone).received))

    assert [received(number, True) for number in range(4)] == [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 1, 1)]
    assert [received(number, False) for number in range(3)] == [(1, 1, 1)] * 3


def test_a_round_of_clients_of_different_ranks_equals_a_numpy_loop():
    """Oracle: each component averaged over those who own it, of clients trained as they are in the round."""
    sim = simulation("sparsifier.name=dense", "lora.client_ranks=[1,3,2]", "local.steps=1")
    state = sim.init(jax.random.key(5))
    after, metrics = sim.run(state, 1)
    data, ids, ranks = sim.world.data, jnp.arange(6), [1, 3, 2, 1, 3, 2]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(round_keys(state.key, state.round).local, ids)
    train = jax.jit(lambda *given: train_cohort(parts(sim), *given, given[-1])[0].adapters)
    trained = train(sim.world, state, state.adapters, clients(sim, state, ids, keys), jnp.ones(6, bool))
    count = np.asarray(data.count, np.float64)
    for name, f in after.adapters.modules.items():
        for i in range(3):
            owners = [k for k in range(6) if i < ranks[k]]
            for part, at in (("a", np.s_[:, :, i]), ("b", np.s_[:, i])):
                mine = np.asarray(getattr(trained.modules[name], part), np.float64)
                expected = sum(count[k] * mine[k][at] for k in owners) / sum(count[k] for k in owners)
                np.testing.assert_allclose(np.asarray(getattr(f, part))[at], expected, rtol=1e-4, atol=1e-6)
    values = [rank * sum(4 * sum(widths) for widths in WIDTH.values()) + 64 * 10 + 10 for rank in ranks]
    np.testing.assert_array_equal(metrics.client_uplink_bits[0], 32 * np.array(values))


def test_hetlora_prunes_the_ranks_of_those_who_took_part():
    """Oracle: a loop over modules and layers of what each client trained.

    The first round, in which the trailing norms rise from 0, prunes nobody; in the second a strong penalty has all who
    take part fall to floor(r / 2).
    """
    sim = simulation(
        "aggregation={name: hetlora, prune: 0.5, regularisation: 10}",
        "sparsifier.name=dense",
        "control.name=ideal",
        "clients.per_round=4",
        "local.optimizer.learning_rate=1e-2",
        "lora={max_rank: 6, rank: 6, client_ranks: [6, 3, 1], targets: [up]}",
    )
    ranks = np.array([6, 3, 1, 6, 3, 1])
    state = sim.init(jax.random.key(1))
    first, _ = sim.run(state, 1)
    np.testing.assert_array_equal(first.clients.rank, ranks)
    second, _ = sim.run(first, 1)
    keys = round_keys(first.key, first.round)
    cohort, _ = sample(sim.layout, 6, keys)
    own = clients(sim, first, cohort, client_keys(keys.local, cohort))
    given = sim.world, first, first.adapters, own, jnp.ones(4, bool)
    trained = jax.jit(lambda *given: train_cohort(parts(sim), *given, given[-1])[0].adapters)(*given)

    def tail(f, rank):
        at = slice(rank // 2, rank)
        return sum(np.linalg.norm(f.a[i, :, at]) * np.linalg.norm(f.b[i, at]) for i in range(4))

    expected, falls = ranks.copy(), []
    for place, k in enumerate(np.asarray(cohort)):
        if ranks[k] > 1:
            own = trees.take(trained.modules["up"], place)
            falls.append(tail(own, ranks[k]) < tail(first.adapters.modules["up"], ranks[k]))
            expected[k] = ranks[k] // 2 if falls[-1] else ranks[k]
    np.testing.assert_array_equal(second.clients.rank, expected)
    assert any(falls)


def test_a_rank_that_all_have_pruned_is_no_part_of_the_evaluated_model():
    """Oracle: by hand, on a run's adapters: b is cut beyond the largest rank that a client has, and nothing else is."""
    sim = simulation("sparsifier.name=dense", "control.name=ideal", "lora={max_rank: 6, rank: 6, targets: [up]}")
    state, _ = sim.run(sim.init(jax.random.key(1)), 1)
    for ranks, left in ((np.array([6, 3, 1, 6, 3, 1]), 6), (np.array([2, 3, 1, 2, 3, 1]), 3)):
        found = deployed(state.adapters, dataclasses.replace(state.clients, rank=jnp.float32(ranks)))
        b = np.array(state.adapters.modules["up"].b)
        assert np.any(b[:, 3:])
        b[:, left:] = 0
        np.testing.assert_array_equal(found.modules["up"].b, b)
        np.testing.assert_array_equal(found.modules["up"].a, state.adapters.modules["up"].a)
    whole = state.clients.rank
    loss = [
        sim.evaluate(dataclasses.replace(state, clients=dataclasses.replace(state.clients, rank=r)))[0]
        for r in (whole, whole / 2)
    ]
    assert loss[0] != loss[1]
