"""Averages client by client against those of all at once, and the memory that they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation import fedit, fedsa, ffa, hetlora, rolora
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Scope
from oracles.sparsifier_oracle import random_adapters, rank_mask, stack, trained_from
from oracles.uploads import uploads

START = random_adapters(0)
CONTEXT = Context(num_clients=4, cohort_size=4, like=START)
METHODS = {
    "fedit": fedit.make(fedit.FedItConfig(), CONTEXT),
    "ffa": ffa.make(ffa.FfaConfig(), CONTEXT),
    "rolora": rolora.make(rolora.RoLoraConfig(), CONTEXT),
    "fedsa": fedsa.make(fedsa.FedSaConfig(), CONTEXT),
    "hetlora": hetlora.make(hetlora.HetLoraConfig(), CONTEXT),
}
WEIGHTS = jnp.array([0.4, 0.3, 0.2, 0.1])
SCALE, KEY = jnp.float32(2.0), jax.random.key(1)


def folded(fold, received, weights):
    """The average of a scan over clients."""

    def add(sums, client):
        return fold.add(sums, START, *client), None

    sums, _ = jax.lax.scan(add, fold.init(START), (received, weights))
    return fold.finish(sums, START)


FOLDED = {name: jax.jit(functools.partial(folded, method.fold)) for name, method in METHODS.items()}
AT_ONCE = {name: jax.jit(method.aggregate) for name, method in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "weights", [WEIGHTS, jnp.array([0.0, 0.7, 0.0, 0.3]), jnp.zeros(4)], ids=["all", "some", "nobody"]
)
@pytest.mark.parametrize(("counts", "round_number"), [("senders", 0), ("owners", 1)])
def test_a_fold_equals_the_average_of_all_at_once(name, counts, round_number, weights):
    """Oracle: `aggregate`, of two of four ranks that are sent; clients of weight 0 hold NaN."""
    sends, here = METHODS[name].traffic(jnp.int32(round_number), True).sent, weights > 0
    scope = Scope(jnp.asarray(rank_mask()), *map(jnp.float32, sends))
    trained = stack([scope.select(trained_from(START, seed), START) for seed in (1, 2, 3, 4)])
    received = uploads(START, trained, rank_mask(), sends, keep=2, counts=counts)
    received = trees.where(here, received, jax.tree.map(lambda x: x * jnp.nan, received))
    found = FOLDED[name](received, weights)
    expected = AT_ONCE[name](START, trained, received, weights, SCALE, KEY).adapters
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    if not np.any(here):
        jax.tree.map(np.testing.assert_array_equal, found, START)


@pytest.mark.parametrize("name", METHODS)
def test_a_fold_of_clients_of_different_ranks_and_of_zero_products(name):
    """Oracle: `aggregate`, with components of some, of one that is absent, and of nobody; then with b = 0."""
    ranks = np.stack([rank_mask(rank) for rank in (1, 6, 5, 2)])
    trained = stack([trained_from(START, seed, rank=r) for seed, r in zip((1, 2, 3, 4), (1, 6, 5, 2), strict=True)])
    weights = jnp.array([0.4, 0.0, 0.35, 0.25])
    for scale in (1.0, 0.0):
        modules = {name: f.replace(b=scale * f.b) for name, f in trained.modules.items()}
        clients = trained.replace(modules=modules)
        received = uploads(START, clients, ranks)
        found = FOLDED[name](received, weights)
        expected = AT_ONCE[name](START, clients, received, weights, SCALE, KEY).adapters
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_fold_of_unmoved_clients_is_the_broadcast(name):
    """Closed form, to the bit."""
    received = uploads(START, stack([START] * 4), rank_mask(), counts="owners")
    found = FOLDED[name](received, WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, found, START)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_memory_of_a_fold_does_not_grow_with_the_cohort(method):
    """Compiled: temporary bytes at 4 and at 64 clients, each made of a key in its turn; stacked, the cohort is held."""

    def client(key):
        def draw(leaf):
            return leaf + jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)

        adapters = jax.tree.map(draw, START)
        return Received(adapters, {name: jnp.ones(f.b.shape[:2]) for name, f in START.modules.items()})

    def in_turn(keys):
        def add(sums, key):
            return method.fold.add(sums, START, client(key), jnp.float32(1.0 / keys.shape[0])), None

        return method.fold.finish(jax.lax.scan(add, method.fold.init(START), keys)[0], START)

    def at_once(keys):
        received = jax.lax.map(client, keys)
        weights = jnp.full(keys.shape, 1.0 / keys.shape[0])
        return method.aggregate(START, received.adapters, received, weights, SCALE, KEY).adapters

    def temporary(function, clients):
        keys = jax.eval_shape(lambda: jax.random.split(KEY, clients))
        return jax.jit(function).lower(keys).compile().memory_analysis().temp_size_in_bytes

    update = trees.num_bytes(START)
    few, many = temporary(in_turn, 4), temporary(in_turn, 64)
    assert 0 < few == many < 16 * update
    assert temporary(at_once, 64) - temporary(at_once, 4) > 50 * update
