"""Both implementations of masked_mean and packed_mean against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.ops.masked_mean import masked_mean, packed_mean
from fedjax_lora_kernels import masked_mean as kernel

IMPLEMENTATIONS = ["xla", "pallas"]
# Clients, layers, ranks, width: one client; more clients than one program adds up; widths no power of two divides.
SHAPES = [(1, 1, 1, 13), (3, 2, 3, 7), (70, 1, 8, 30), (2, 1, 64, 5)]


def arrays(clients, layers, ranks, width):
    generator = np.random.default_rng(0)
    old = generator.standard_normal((layers, ranks, width)).astype(np.float32)
    x = (old + generator.standard_normal((clients, layers, ranks, width))).astype(np.float32)
    weights = generator.random((clients, layers, ranks)).astype(np.float32) * (
        generator.random((clients, layers, ranks)) > 0.3
    )
    return old, x, weights.astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_masked_mean_equals_float64(shape, implementation):
    old, x, weights = arrays(*shape)
    expected = old + np.einsum("clr,clrn->lrn", np.float64(weights), np.float64(x) - old)
    found = masked_mean(old, x, weights, axis=-1, implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    turned = masked_mean(old.swapaxes(-1, -2), x.swapaxes(-1, -2), weights, axis=-2, implementation=implementation)
    np.testing.assert_allclose(turned, expected.swapaxes(-1, -2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_mean_equals_a_loop_in_float64(shape, implementation):
    old, x, weights = arrays(*shape)
    clients, layers, ranks, _ = shape
    slots = max(ranks // 2, 1)
    generator = np.random.default_rng(1)
    index = np.stack([generator.permutation(ranks)[:slots] for _ in range(clients * layers)])
    index = index.reshape(clients, layers, slots).astype(np.int32)
    index[0, 0, 0] = -1
    expected = np.float64(old)
    for client in range(clients):
        for layer in range(layers):
            for slot, rank in enumerate(index[client, layer]):
                if rank >= 0:
                    expected[layer, rank] += np.float64(weights[client, layer, slot]) * x[client, layer, slot]
    found = packed_mean(old, x[:, :, :slots], index, weights[:, :, :slots], implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_copies_of_the_old_factors_give_them_to_the_last_bit(implementation):
    """Invariance: changes are averaged, not values."""
    old, x, weights = arrays(5, 2, 3, 11)
    copies = np.broadcast_to(old, x.shape)
    np.testing.assert_array_equal(masked_mean(old, copies, weights, axis=-1, implementation=implementation), old)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_closed_forms(implementation):
    """Of `sum(g * mean)`: to x it is w g, to old (1 - sum of w) g, and to w the product of g and the change."""
    old, x, weights = arrays(3, 2, 3, 7)
    g = np.random.default_rng(2).standard_normal(old.shape).astype(np.float32)

    def total(old, x, weights):
        return jnp.sum(g * masked_mean(old, x, weights, axis=-1, implementation=implementation))

    of_old, of_x, of_weights = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(old, x, weights)
    np.testing.assert_allclose(of_old, (1 - weights.sum(0))[..., None] * g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, weights[..., None] * g, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_weights, np.sum(g * (x - old), -1), rtol=1e-5, atol=1e-5)


def test_stretches_of_a_width_that_hang_over_the_edge_equal_the_reference(monkeypatch):
    """The blocks of a TPU, by the interpreter: 130 columns in two stretches of 128."""
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 1)
    monkeypatch.setattr(kernel, "options", lambda target: {"interpret": True})
    old, x, weights = arrays(3, 2, 3, 130)
    found = jax.jit(functools.partial(kernel.masked_mean.__wrapped__, target="tpu"))(old, x, weights)
    np.testing.assert_allclose(found, masked_mean(old, x, weights, axis=-1), rtol=1e-5, atol=1e-5)


def test_bad_arguments_name_what_is_allowed():
    """The messages that the docstring promises."""
    old = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"x must have the shape \('C', 4, 3\), got \(2, 3, 4\)"):
        masked_mean(old, jnp.ones((2, 3, 4)), jnp.ones((2, 3)), axis=-2)
    with pytest.raises(ValueError, match="axis must be -2 or -1, got 0"):
        masked_mean(old, old[None], jnp.ones((1, 3)), axis=0)  # pyright: ignore[reportArgumentType]
