"""Both implementations of rank_energy against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.ops.rank_energy import rank_energy

IMPLEMENTATIONS = ["xla", "pallas"]
# Widths 24 (three blocks of 8) and 13 (blocks of 1) and ranks that are no power of two.
SHAPES = [((2, 24, 6), -2), ((2, 6, 24), -1), ((13, 3), -2), ((3, 13), -1), ((2, 3, 16, 4), -2)]


def pair(shape):
    generator = np.random.default_rng(0)
    x0 = generator.standard_normal(shape)
    return jnp.float32(x0 + 0.1 * generator.standard_normal(shape)), jnp.float32(x0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_equals_numpy_sums(shape, axis, implementation):
    x, x0 = pair(shape)
    found = rank_energy(x, x0, axis=axis, implementation=implementation)
    x, x0 = np.float64(x), np.float64(x0)
    np.testing.assert_allclose(found.change, np.sum((x - x0) ** 2, axis), rtol=2e-6)
    np.testing.assert_allclose(found.mean, np.sum(((x + x0) / 2) ** 2, axis), rtol=2e-6)
    np.testing.assert_allclose(found.cross, np.sum((x**2 - x0**2) / 2, axis), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:2])
def test_gradient_equals_closed_form(shape, axis, implementation):
    """d/dx of |d|^2 + 2 |m|^2 + 3 d.m is 2 d + 2 m + 3 x, and of x0 -2 d + 2 m - 3 x0."""
    x, x0 = pair(shape)

    def total(x, x0):
        change, mean, cross = rank_energy(x, x0, axis=axis, implementation=implementation)
        return jnp.sum(change + 2.0 * mean + 3.0 * cross)

    gradient, gradient0 = jax.jit(jax.grad(total, argnums=(0, 1)))(x, x0)
    np.testing.assert_allclose(gradient, 2 * (x - x0) + (x + x0) + 3 * x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient0, -2 * (x - x0) + (x + x0) - 3 * x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_equals_loop(implementation):
    x, x0 = pair((3, 2, 24, 6))

    def one(x, x0):
        return rank_energy(x, x0, axis=-2, implementation=implementation)

    mapped = jax.jit(jax.vmap(one))(x, x0)
    looped = [one(x[i], x0[i]) for i in range(3)]
    for field, parts in zip(mapped, zip(*looped, strict=True), strict=True):
        np.testing.assert_allclose(field, np.stack(parts), rtol=1e-6, atol=1e-6)


def test_implementations_agree():
    """Each is the other's oracle at a width of several full blocks."""
    x, x0 = pair((2, 3072, 8))
    for xla, pallas in zip(
        rank_energy(x, x0, axis=-2), rank_energy(x, x0, axis=-2, implementation="pallas"), strict=True
    ):
        np.testing.assert_allclose(pallas, xla, rtol=1e-5, atol=1e-4)


def test_bad_arguments_name_what_is_allowed():
    """The messages that the docstring promises."""
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"x0 must have the shape of x, \(4, 3\), got \(3, 4\)"):
        rank_energy(x, x.T, axis=-2)
    with pytest.raises(ValueError, match="axis must be -2 or -1, got 0"):
        rank_energy(x, x, axis=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="implementation must be None, 'xla' or 'pallas', got 'triton'"):
        rank_energy(x, x, axis=-2, implementation="triton")  # pyright: ignore[reportArgumentType]
