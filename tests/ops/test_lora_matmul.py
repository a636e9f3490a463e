"""Both implementations of lora_matmul against float64 NumPy, gradients against closed forms and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Factors
from fedjax_lora.ops import primitives
from fedjax_lora.ops.lora_matmul import lora_matmul

IMPLEMENTATIONS = ["xla", "pallas"]
# Clients, rows, n_in, n_out, ranks: one client; more clients than stand side by side; odd widths.
SHAPES = [(1, 3, 5, 7, 1), (3, 5, 12, 10, 3), (18, 9, 9, 6, 8), (3, 4, 11, 5, 64)]


def arrays(clients, rows, n_in, n_out, ranks):
    generator = np.random.default_rng(0)
    shapes = (clients, rows, n_in), (n_in, n_out), (clients, n_in, ranks), (clients, ranks, n_out)
    x, w, a, b = (jnp.float32(generator.standard_normal(shape)) for shape in shapes)
    return x, w, Factors(a=a, b=b), jnp.float32(generator.standard_normal((clients, rows, n_out)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients_equal_float64(shape, implementation):
    """Closed forms, with G = g b^T and X = x a: dx = g w^T + s G a^T, da = s x^T G, db = s X^T g, dw = sum of x^T g."""
    x, w, factors, g = arrays(*shape)
    scale = jnp.float32(0.7)

    def of(x, w, factors, scale):
        return lora_matmul(x, w, factors, scale, implementation=implementation)

    def forward_and_backward(*values):
        y, pull_back = jax.vjp(of, *values)
        return y, *pull_back(g)

    y, dx, dw, grown, ds = jax.jit(forward_and_backward)(x, w, factors, scale)
    x, w, a, b, g = (np.float64(v) for v in (x, w, factors.a, factors.b, g))
    s = 0.7
    of_g, of_x = g @ b.swapaxes(1, 2), x @ a
    for found, expected in (
        (y, x @ w + s * of_x @ b),
        (dx, g @ w.T + s * of_g @ a.swapaxes(1, 2)),
        (dw, np.einsum("cti,cto->io", x, g)),
        (grown.a, s * x.swapaxes(1, 2) @ of_g),
        (grown.b, s * of_x.swapaxes(1, 2) @ g),
        (ds, np.sum(g * (of_x @ b))),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_finite_differences(implementation):
    """Central differences in float64 of `sum(sin(x w + (x a) b))`, along a random direction."""
    x, w, factors, _ = arrays(2, 6, 5, 4, 3)
    generator = np.random.default_rng(1)
    leaves = [x, factors.a, factors.b]
    along = [generator.standard_normal(leaf.shape) for leaf in leaves]

    def total(x, a, b):
        return jnp.sum(jnp.sin(lora_matmul(x, w, Factors(a, b), implementation=implementation)))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*leaves)
    slope = sum(np.vdot(g, d) for g, d in zip(gradients, along, strict=True))

    def exact(step):
        x, a, b = (np.float64(leaf) + step * d for leaf, d in zip(leaves, along, strict=True))
        return np.sin(x @ np.float64(w) + (x @ a) @ b).sum()

    assert slope == pytest.approx((exact(1e-6) - exact(-1e-6)) / 2e-6, rel=1e-4)


def test_bfloat16_rounds_as_the_reference():
    """Oracle: the other implementation, which rounds operands and narrow products alike; packed weights too."""
    x, w, factors, g = arrays(3, 5, 24, 10, 3)
    packed = primitives.pack(w.astype(jnp.bfloat16))

    @functools.partial(jax.jit, static_argnames="implementation")
    def of(implementation):
        y, pull_back = jax.vjp(lambda x, f: lora_matmul(x, packed, f, implementation=implementation), x, factors)
        return y, *jax.tree.leaves(pull_back(g))

    for found, expected in zip(of("pallas"), of("xla"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-2)


def test_modules_side_by_side_equal_each_alone():
    """Invariance: factors of two modules as one pair, each in columns of its own."""
    x, w, first, _ = arrays(2, 3, 5, 8, 3)
    second = Factors(a=first.a[::-1], b=2.0 * first.b[::-1])
    b1, b2 = first.b[..., :4], second.b[..., 4:]
    joined = Factors(
        a=jnp.concatenate([first.a, second.a], -1),
        b=jnp.concatenate([jnp.pad(b1, ((0, 0), (0, 0), (0, 4))), jnp.pad(b2, ((0, 0), (0, 0), (4, 0)))], 1),
    )
    together = lora_matmul(x, w, joined, implementation="pallas")
    left = lora_matmul(x, w[:, :4], Factors(first.a, b1), implementation="pallas")
    right = lora_matmul(x, w[:, 4:], Factors(second.a, b2), implementation="pallas")
    np.testing.assert_allclose(together, jnp.concatenate([left, right], -1), rtol=1e-5, atol=1e-5)


def test_bad_arguments_name_what_is_allowed():
    """The message that the docstring promises."""
    x, w, factors, _ = arrays(2, 6, 5, 4, 3)
    with pytest.raises(ValueError, match="x, a and b must be of as many clients, got "):
        lora_matmul(x[:1], w, factors)
