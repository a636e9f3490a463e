"""Quantised numbers, against closed forms of stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Transform
from fedjax_lora.sparsifiers import dense, soft, top_k
from fedjax_lora.sparsifiers.transforms import WireConfig, apply, chain, quantise
from oracles.contexts import context, offered_bits
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, RANK, WIDTHS, element_bits, payload_bits, random_adapters, scope

KEY = jax.random.key(0)
START, OTHER = random_adapters(0), random_adapters(1)
MATRICES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), jnp.float32)


@pytest.mark.parametrize("levels", [127, 7])
def test_rounding_is_unbiased(levels):
    """Closed form: the mean over n draws is x, within five standard errors; one draw varies by at most step / 2."""
    draws = 4000
    x = MATRICES[0, 0]
    found = jax.vmap(lambda key: quantise(x, key, levels))(jax.random.split(KEY, draws))
    step = float(jnp.max(jnp.abs(x))) / levels
    np.testing.assert_allclose(found.mean(0), x, rtol=0, atol=5 * 0.5 * step / draws**0.5)
    fraction = np.float64(x) / step - np.floor(np.float64(x) / step)
    np.testing.assert_allclose(found.var(0), step**2 * fraction * (1 - fraction), atol=0.05 * step**2)


@pytest.mark.parametrize("levels", [127, 7])
def test_error_is_below_one_step_of_each_matrix(levels):
    """Closed form: steps of the largest magnitude of a matrix over the levels, each matrix with its own."""
    x = MATRICES * jnp.array([1.0, 1e-6, 1e6])[:, None, None]
    error = np.abs(quantise(x, KEY, levels) - x)
    step = np.abs(x).max((-2, -1), keepdims=True) / levels
    assert np.all(error <= step * (1 + 1e-5))
    assert np.all(error.max((-2, -1), keepdims=True) > 0.2 * step)


@pytest.mark.parametrize("levels", [127, 7])
def test_values_on_a_level_are_exact(levels):
    """Closed form: multiples of a power of two times scale / levels, with both extremes, at every draw."""
    x = jnp.arange(-levels, levels + 1, dtype=jnp.float32).reshape(1, -1) / 8
    for key in jax.random.split(KEY, 20):
        np.testing.assert_array_equal(quantise(x, key, levels), x)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_zero_stays_zero_and_nothing_leaves_the_extremes(shape):
    """Closed form, to the bit: zeros, also among others, and the range of what is sent."""
    np.testing.assert_array_equal(quantise(jnp.zeros(shape), KEY, 7), jnp.zeros(shape))
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    sparse = jnp.where(jax.random.bernoulli(KEY, 0.5, shape), x, 0.0)
    found = quantise(sparse, KEY, 7)
    assert np.all(found[sparse == 0] == 0)
    assert np.max(np.abs(found)) <= np.max(np.abs(sparse)) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_value_takes_no_more_levels_than_its_bits(bits):
    """Closed form: at most 2^bits - 1 different values of a matrix."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((200, 200)), jnp.float32)
    (wire,) = chain(WireConfig(bits=bits))
    assert (wire.bits_per_value, wire.bits_per_tensor) == (bits, 32)
    levels = np.unique(wire.apply({"x": x}, KEY)["x"])
    assert 2 ** (bits - 1) < len(levels) <= 2**bits - 1


def arriving(sent, known, bits):
    """What a dense update to `sent` becomes, for a receiver who knows `known`."""
    method, used = dense.make(dense.DenseConfig(), context(START)), scope(MAX_RANK)
    message = method.encode(known, sent, (), jnp.float32(MAX_RANK), used, KEY)
    return method.decode(known, apply(chain(WireConfig(bits=bits)), message, KEY), used).adapters


def test_what_is_known_is_not_sent_again():
    """Oracle: the difference leaf by leaf; equal leaves arrive to the bit, others within a step of the difference."""
    jax.tree.map(np.testing.assert_array_equal, arriving(START, START, 4), START)
    found = arriving(OTHER, START, 4)

    def check(x, sent, known):
        change = np.abs(sent - known)
        step = change.max(tuple(range(max(x.ndim - 2, 0), x.ndim)), keepdims=True) / 7
        assert np.all(np.abs(x - sent) <= step * (1 + 1e-5) + 1e-6)
        assert np.any(x != sent)

    jax.tree.map(check, found, OTHER, START)


def test_in_full_nothing_changes():
    """Identity: 32 bits are the numbers themselves, to one rounding where a change is added back."""
    assert chain(WireConfig()) == ()
    message = _message({"x": MATRICES}, {"x": jnp.ones((), bool)})
    np.testing.assert_array_equal(apply((), message, KEY).tensors["x"], MATRICES)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), arriving(OTHER, START, 32), OTHER)


def _message(tensors, sent):
    return Message(tensors, sent, Count.of(0), jnp.zeros(()), jnp.zeros(()), exact=MATRICES, exact_sent=jnp.ones(()))


def test_transforms_work_in_turn_on_what_is_sent_alone():
    """Oracle: the functions by hand; keys differ, what is exact stays, and noise falls where values are sent."""

    def noise(tensors, key):
        return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), tensors)

    def double(tensors, key):
        return jax.tree.map(lambda x: 2.0 * x + jax.random.uniform(key), tensors)

    mask = jnp.arange(5) < 3
    message = _message({"x": jnp.where(mask, MATRICES, 0.0)}, {"x": mask})
    steps = [Transform(noise), Transform(double, bits_per_value=16)]
    found = apply(steps, message, KEY)
    first, second = jax.random.split(KEY)
    noisy = MATRICES + jax.random.normal(first, MATRICES.shape)
    expected = jnp.where(mask, 2.0 * noisy + jax.random.uniform(second), 0.0)
    np.testing.assert_array_equal(found.tensors["x"], expected)
    np.testing.assert_array_equal(found.exact, MATRICES)
    jax.tree.map(np.testing.assert_array_equal, found.sent, message.sent)


def test_keys_of_leaves_are_those_of_one_split():
    """Closed form: leaf i of the tensors is rounded with key i of as many as there are leaves."""
    message = dense.make(dense.DenseConfig(), context(START)).encode(START, OTHER, (), jnp.float32(4), scope(), KEY)
    found = jax.tree.leaves(apply(chain(WireConfig(bits=8)), message, KEY).tensors)
    changes = jax.tree.leaves(message.tensors)
    for x, change, key in zip(found, changes, jax.random.split(KEY, len(changes)), strict=True):
        np.testing.assert_array_equal(x, quantise(change, key, 127))


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_equal_count_with_scales(bits):
    """A count value by value, for components, elements and everything."""
    half, whole = ({name: [count] * LAYERS for name in WIDTHS} for count in (RANK // 2, RANK))
    planned = [
        offered_bits(module.make(config, context(START)), START, OTHER, scope(), bits)[RANK // 2]
        for module, config in (
            (soft, soft.SoftConfig()),
            (dense, dense.DenseConfig()),
            (top_k, top_k.TopKConfig()),
        )
    ]
    assert planned == [payload_bits(half, True, 0, bits), payload_bits(whole, False, 0, bits), element_bits(0.5, bits)]


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="bits must be one of 32, 8, 4, got 16"):
        WireConfig(bits=16)  # pyright: ignore[reportArgumentType]
