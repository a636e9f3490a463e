"""Factorisations of stacks, with NumPy as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.ops import factorise

STACK = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))


def rebuilt(name: str, x: jax.Array) -> jax.Array:
    """The matrices that the factors of `x` are of."""
    factors = getattr(factorise, name)(x)
    if name == "eigh":
        values, vectors = factors
        return (vectors * values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
    if name == "qr":
        return factors[0] @ factors[1]
    return (factors[0] * factors[1][..., None, :]) @ factors[2]


@pytest.mark.parametrize("name", ["eigh", "qr", "svd"])
@pytest.mark.parametrize("turn", [lambda f: f, jax.jit, jax.vmap, lambda f: jax.jit(jax.vmap(jax.vmap(f)))])
def test_factors_are_those_of_each_matrix_by_numpy(name, turn):
    x = STACK @ jnp.swapaxes(STACK, -1, -2) if name == "eigh" else STACK
    np.testing.assert_allclose(turn(lambda x: rebuilt(name, x))(x), x, atol=1e-4)
    if name == "eigh":
        np.testing.assert_allclose(turn(factorise.eigh)(x)[0], np.linalg.eigvalsh(x), atol=1e-4)
    if name == "svd":
        np.testing.assert_allclose(turn(factorise.svd)(x)[1], np.linalg.svd(x, compute_uv=False), atol=1e-5)


def test_orthonormal_columns_by_their_gram_matrix():
    q = factorise.orthonormal(jax.random.key(1), (2, 7, 3))
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-6)
