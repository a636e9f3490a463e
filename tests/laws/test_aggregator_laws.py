"""Laws that every aggregator obeys, over one table of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora import trees
from fedjax_lora.aggregation import fedit
from fedjax_lora.sparsifiers import soft
from oracles.sparsifier_oracle import random_adapters, scope, stack, trained_from

TABLE = {"fedit": (fedit, fedit.FedItConfig())}
START = random_adapters(0)
TRAINED = stack([trained_from(START, seed) for seed in (1, 2, 3, 4)])
WEIGHTS = jnp.array([0.4, 0.3, 0.2, 0.1])
SCOPE = scope()
KEY = jax.random.key(1)
SCALE = jnp.float32(2.0)
COMPRESS = jax.jit(jax.vmap(soft.make(soft.SoftConfig(), START).compress, in_axes=(None, 0, None, None, None, None)))
SENT = COMPRESS(START, TRAINED, (), jnp.float32(0.5), SCOPE, jax.random.key(0))[0]


@pytest.fixture(scope="module", params=TABLE)
def aggregate(request):
    module, config = TABLE[request.param]
    return module.make(config).aggregate


@pytest.fixture(scope="module")
def jitted(aggregate):
    return jax.jit(aggregate)


def assert_close(x, y):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


def test_jit_equals_eager(aggregate, jitted):
    assert_close(
        jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY), aggregate(START, TRAINED, SENT, WEIGHTS, SCALE, KEY)
    )


def test_vmap_equals_loop(jitted):
    """Seeds and settings: other weights and scales over one cohort."""
    weights, scales = jnp.stack([WEIGHTS, WEIGHTS[::-1]]), jnp.array([1.0, 3.0])
    mapped = jax.vmap(jitted, in_axes=(None, None, None, 0, 0, None))(START, TRAINED, SENT, weights, scales, KEY)
    assert_close(mapped, stack([jitted(START, TRAINED, SENT, weights[i], scales[i], KEY) for i in range(2)]))


def test_dtypes_and_shapes_are_kept(aggregate):
    """Structure: the result is like the broadcast, the errors are float32 scalars."""
    found = jax.eval_shape(aggregate, START, TRAINED, SENT, WEIGHTS, SCALE, KEY)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), found.adapters, START)
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


def test_permutation_of_clients_changes_nothing(jitted):
    """Invariance."""
    order = jnp.array([2, 0, 3, 1])
    permuted = jitted(START, trees.take(TRAINED, order), trees.take(SENT, order), WEIGHTS[order], SCALE, KEY)
    assert_close(permuted, jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY))


@pytest.mark.parametrize("value", [5.0, np.nan, np.inf])
def test_client_of_weight_zero_changes_nothing(jitted, value):
    """Invariance: padding by two clients of any content, NaN included."""

    def pad(leaf):
        return jnp.concatenate([leaf, jnp.full((2, *leaf.shape[1:]), value).astype(leaf.dtype)])

    sent = SENT.replace(
        adapters=jax.tree.map(pad, SENT.adapters), counted={name: pad(m) for name, m in SENT.counted.items()}
    )
    padded = jitted(START, jax.tree.map(pad, TRAINED), sent, jnp.append(WEIGHTS, jnp.zeros(2)), SCALE, KEY)
    assert_close(padded, jitted(START, TRAINED, SENT, WEIGHTS, SCALE, KEY))


def test_nobody_leaves_the_broadcast(jitted):
    """Closed form: weights all zero give the broadcast to the bit, and no error."""
    found = jitted(START, jax.tree.map(lambda x: x * jnp.nan, TRAINED), SENT, jnp.zeros(4), SCALE, KEY)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
    assert found.sparsification_error == 0.0
    assert found.covariance_error == 0.0


def test_zero_updates_leave_the_broadcast(jitted):
    """Closed form: clients that hold the broadcast return it to the bit."""
    still = stack([START] * 4)
    sent = COMPRESS(START, still, (), jnp.float32(0.5), SCOPE, jax.random.key(0))[0]
    found = jitted(START, still, sent, WEIGHTS, SCALE, KEY)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, START)
    assert found.covariance_error == 0.0
    np.testing.assert_allclose(found.sparsification_error, 0.0, atol=2e-5)


def test_scale_multiplies_both_errors(jitted):
    """Closed form: the norms are linear in s."""
    once, thrice = (jitted(START, TRAINED, SENT, WEIGHTS, jnp.float32(s), KEY) for s in (1.0, 3.0))
    np.testing.assert_allclose(thrice.sparsification_error, 3 * once.sparsification_error, rtol=1e-6)
    np.testing.assert_allclose(thrice.covariance_error, 3 * once.covariance_error, rtol=1e-6)
    assert once.sparsification_error > 0.1 and once.covariance_error > 0.1
