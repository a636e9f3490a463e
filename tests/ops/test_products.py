"""Norms of products against the explicit product in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Factors
from fedjax_lora.ops.products import differences, gram, product_energy


def draw(*shape):
    return jnp.float32(np.random.default_rng(1).standard_normal(shape))


@pytest.mark.parametrize("m", [3, 8, 9, 40])
def test_energy_equals_explicit_product(m):
    """n p = 66 lies between 8^2 and 9^2, so both forms are taken."""
    u, v = draw(2, 6, m), draw(2, m, 11)
    expected = np.sum((np.float64(u) @ np.float64(v)) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(product_energy(u, v), expected, rtol=1e-5)


def test_forms_agree():
    """Invariance: zero columns change nothing but the form that is taken."""
    u, v = draw(6, 5), draw(5, 11)
    padded = product_energy(jnp.pad(u, ((0, 0), (0, 30))), jnp.pad(v, ((0, 30), (0, 0))))
    np.testing.assert_allclose(product_energy(u, v), padded, rtol=1e-5)


def test_smaller_matrix_is_formed():
    """Structure: no array of the traced program is larger than its inputs and the smaller of the two forms."""
    for m, allowed in ((3, 100 * 3), (500, 20 * 500)):
        n, p = (100, 70) if m == 3 else (20, 10)
        jaxpr = jax.make_jaxpr(product_energy)(jnp.ones((n, m)), jnp.ones((m, p)))
        assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) <= allowed


def test_cancelling_components_are_not_negative():
    """Closed form: u v - u v = 0."""
    u, v = draw(30, 4), draw(4, 25)
    energy = product_energy(jnp.concatenate([u, -u], 1), jnp.concatenate([v, v], 0))
    assert 0.0 <= energy <= 1e-2


def test_gram_equals_numpy():
    x = draw(2, 7, 3)
    np.testing.assert_allclose(gram(x), np.swapaxes(np.float64(x), 1, 2) @ np.float64(x), rtol=1e-5, atol=1e-5)


def test_differences_are_those_of_the_explicit_products():
    """NumPy in float64; and to the bit nothing where nothing differs."""
    x, y = ({"w": Factors(a=draw(2, 6, 3) + by, b=draw(2, 3, 11) - by)} for by in (0.0, 0.5))
    found = differences(x, y)["w"]
    expected = np.float64(x["w"].a) @ np.float64(x["w"].b) - np.float64(y["w"].a) @ np.float64(y["w"].b)
    np.testing.assert_allclose(found.a @ found.b, expected, rtol=1e-4, atol=1e-5)
    same = differences(x, x)["w"]
    assert not np.any(same.a @ same.b)
    assert found.a.shape == (2, 6, 6) and found.b.shape == (2, 6, 11)
