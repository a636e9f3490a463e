"""Laws that every aggregator obeys, over one table of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora import trees
from fedjax_lora.aggregation import fedex, fedit, flexlora, flora, lora_fair
from fedjax_lora.sparsifiers import soft
from oracles.sparsifier_oracle import LAYERS, WIDTHS, random_adapters, scope, stack, trained_from

TABLE = {
    "fedit": (fedit, fedit.FedItConfig()),
    "fedex": (fedex, fedex.FedExConfig()),
    "fedex reinit": (fedex, fedex.FedExConfig(start="reinit")),
    "flora": (flora, flora.FloraConfig()),
    "flexlora": (flexlora, flexlora.FlexLoraConfig()),
    "lora_fair": (lora_fair, lora_fair.LoraFairConfig()),
}
EXACT = {"fedex", "fedex reinit", "flora"}
"""Methods whose product is the ideal one: they have no covariance error."""
NEW_BASIS = {"fedex reinit", "flora", "flexlora"}
"""Methods that return the product of equal clients, but in other factors."""
SIGNS = {"flexlora"}
"""Methods whose factors are unique up to signs alone."""
START = random_adapters(0)
TRAINED = stack([trained_from(START, seed) for seed in (1, 2, 3, 4)])
WEIGHTS = jnp.array([0.4, 0.3, 0.2, 0.1])
SCOPE = scope()
KEY = jax.random.key(1)
SCALE = jnp.float32(2.0)
COMPRESS = jax.jit(jax.vmap(soft.make(soft.SoftConfig(), START).compress, in_axes=(None, 0, None, None, None, None)))
SENT = COMPRESS(START, TRAINED, (), jnp.float32(0.5), SCOPE, jax.random.key(0))[0]


@pytest.fixture(scope="module", params=TABLE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def aggregate(name):
    module, config = TABLE[name]
    return module.make(config).aggregate


@pytest.fixture(scope="module")
def jitted(aggregate):
    return jax.jit(aggregate)


@pytest.fixture(scope="module")
def assert_same(name):
    """Closeness of two results: of their products where the signs of the factors are free."""

    def products(found):
        modules = {n: jnp.einsum("...ir,...ro->...io", f.a, f.b) for n, f in found.adapters.modules.items()}
        return found._replace(adapters=found.adapters.replace(modules=modules))

    def check(x, y, rtol=1e-5, atol=1e-6):
        if name in SIGNS:
            x, y, rtol, atol = products(x), products(y), 1e-4, 2e-5
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), x, y)

    return check


def server_products(found, scale=SCALE):
    """Module -> what the server's factors and what it merged add to the frozen weights."""
    return {
        n: scale * jnp.einsum("lir,lro->lio", f.a, f.b) + found.merged.get(n, 0.0)
        for n, f in found.adapters.modules.items()
    }


def test_jit_equals_eager(aggregate, jitted, assert_same):
    assert_same(jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY), aggregate(START, TRAINED, SENT, WEIGHTS, SCALE, KEY))


def test_vmap_equals_loop(jitted, assert_same):
    """Seeds and settings: other weights and scales over one cohort."""
    weights, scales = jnp.stack([WEIGHTS, WEIGHTS[::-1]]), jnp.array([1.0, 3.0])
    mapped = jax.vmap(jitted, in_axes=(None, None, None, 0, 0, None))(START, TRAINED, SENT, weights, scales, KEY)
    assert_same(mapped, stack([jitted(START, TRAINED, SENT, weights[i], scales[i], KEY) for i in range(2)]))


def test_dtypes_and_shapes_are_kept(name, aggregate):
    """Structure: the result is like the broadcast, what is merged like the products, the errors float32 scalars."""
    found = jax.eval_shape(aggregate, START, TRAINED, SENT, WEIGHTS, SCALE, KEY)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), found.adapters, START)
    merged = (
        {n: (LAYERS, *widths) for n, widths in WIDTHS.items()} if TABLE[name][0].make(TABLE[name][1]).merges else {}
    )
    assert {n: leaf.shape for n, leaf in found.merged.items()} == merged
    for error in (found.sparsification_error, found.covariance_error):
        assert (error.shape, error.dtype) == ((), jnp.float32)


def test_traced_once_for_all_weights(aggregate):
    """Structure: who takes part is data."""
    traces = []

    @jax.jit
    def counted(weights, scale):
        traces.append(1)
        return aggregate(START, TRAINED, SENT, weights, scale, KEY)

    for weights in (WEIGHTS, jnp.array([0.0, 1.0, 0.0, 0.0]), jnp.zeros(4)):
        counted.trace(weights, SCALE)
    assert len(traces) == 1


def test_permutation_of_clients_changes_nothing(jitted, assert_same):
    """Invariance."""
    order = jnp.array([2, 0, 3, 1])
    permuted = jitted(START, trees.take(TRAINED, order), trees.take(SENT, order), WEIGHTS[order], SCALE, KEY)
    assert_same(permuted, jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY))


@pytest.mark.parametrize("value", [5.0, np.nan, np.inf])
def test_client_of_weight_zero_changes_nothing(jitted, assert_same, value):
    """Invariance: padding by two clients of any content, NaN included."""

    def pad(leaf):
        return jnp.concatenate([leaf, jnp.full((2, *leaf.shape[1:]), value).astype(leaf.dtype)])

    sent = SENT.replace(
        adapters=jax.tree.map(pad, SENT.adapters), counted={name: pad(m) for name, m in SENT.counted.items()}
    )
    padded = jitted(START, jax.tree.map(pad, TRAINED), sent, jnp.append(WEIGHTS, jnp.zeros(2)), SCALE, KEY)
    assert_same(padded, jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY))


def test_nobody_leaves_the_broadcast(jitted):
    """Closed form: weights all zero give the broadcast to the bit, nothing merged, and no error."""
    found = jitted(START, jax.tree.map(lambda x: x * jnp.nan, TRAINED), SENT, jnp.zeros(4), SCALE, KEY)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
    assert not any(np.any(leaf) for leaf in found.merged.values())
    assert found.sparsification_error == 0.0
    assert found.covariance_error == 0.0


def test_zero_updates_leave_the_broadcast(name, jitted):
    """Closed form: clients that hold the broadcast return it, to the bit where its basis stays."""
    still = stack([START] * 4)
    sent = COMPRESS(START, still, (), jnp.float32(0.5), SCOPE, jax.random.key(0))[0]
    found = jitted(START, still, sent, WEIGHTS, SCALE, KEY)
    if name in NEW_BASIS:
        before = {n: SCALE * jnp.einsum("lir,lro->lio", f.a, f.b) for n, f in START.modules.items()}
        for n, after in server_products(found).items():
            np.testing.assert_allclose(after, before[n], rtol=1e-4, atol=2e-5)
        jax.tree.map(np.testing.assert_array_equal, found.adapters.head, START.head)
        assert found.covariance_error < 1e-3
    else:
        jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
        assert not any(np.any(leaf) for leaf in found.merged.values())
        assert found.covariance_error == 0.0
    np.testing.assert_allclose(found.sparsification_error, 0.0, atol=2e-5)


def test_error_of_an_exact_method_is_rounding(name, jitted):
    """Closed form: 0; every other method has one here."""
    found = jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY)
    assert (found.covariance_error < 1e-3) == (name in EXACT)


def test_scale_multiplies_both_errors(name, jitted):
    """Closed form: the norms are linear in s."""
    once, thrice = (jitted(START, TRAINED, SENT, WEIGHTS, jnp.float32(s), KEY) for s in (1.0, 3.0))
    np.testing.assert_allclose(thrice.sparsification_error, 3 * once.sparsification_error, rtol=1e-6)
    np.testing.assert_allclose(thrice.covariance_error, 3 * once.covariance_error, rtol=1e-6, atol=1e-3)
    assert once.sparsification_error > 0.1
    assert once.covariance_error > 0.1 or name in EXACT
