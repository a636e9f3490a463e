"""The error norms' two forms, and the memory that they need."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.aggregation.errors import covariance_energy, sparsification_energy
from fedjax_lora.core.types import Factors


def draw(clients, n_in, n_out, rank, seed):
    generator = np.random.default_rng(seed)
    return Factors(
        a=jnp.float32(generator.standard_normal((clients, n_in, rank))),
        b=jnp.float32(generator.standard_normal((clients, rank, n_out))),
    )


def test_forms_agree():
    """Invariance: zero rows of a widen the product past the Gram matrix and change no norm."""
    decoded, trained = draw(5, 6, 7, 3, 0), draw(5, 6, 7, 3, 1)
    weights, w = jnp.full(5, 0.2), jnp.full((5, 3), 0.2)

    @jax.jit
    def both(trained, decoded):
        average = jax.tree.map(lambda x: jnp.mean(x, 0), decoded)
        return sparsification_energy(trained, decoded, weights, w), covariance_energy(decoded, average, w)

    def widen(f):
        return Factors(a=jnp.pad(f.a, ((0, 0), (0, 400), (0, 0))), b=f.b)

    np.testing.assert_allclose(both(trained, decoded), both(widen(trained), widen(decoded)), rtol=1e-5)


def test_a_thousand_clients_form_no_matrix_of_clients_squared():
    """Structure: traced for 1,000 clients of rank 8, the largest array is the stack, linear in the clients."""
    factors = Factors(
        a=jax.ShapeDtypeStruct((1000, 32, 8), jnp.float32), b=jax.ShapeDtypeStruct((1000, 8, 48), jnp.float32)
    )
    average = jax.eval_shape(lambda f: jax.tree.map(lambda x: x[0], f), factors)
    w, p = jax.ShapeDtypeStruct((1000, 8), jnp.float32), jax.ShapeDtypeStruct((1000,), jnp.float32)
    stack = 2 * 1000 * 8 * 48
    for jaxpr in (
        jax.make_jaxpr(sparsification_energy)(factors, factors, p, w),
        jax.make_jaxpr(covariance_energy)(factors, average, w),
    ):
        assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) <= stack
