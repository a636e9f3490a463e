"""Norms, also of products of thin matrices, without the product where that is the larger thing to form."""

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Factors


def gram(x: Array) -> Array:
    """`[..., m, m]` inner products of the columns of x `[..., n, m]`, in full float32."""
    # Accelerators shorten float32 products by default; differences of Gram entries would not survive that.
    return jnp.einsum("...ni,...nj->...ij", x, x, precision=jax.lax.Precision.HIGHEST)


def safe_sqrt(x: Array) -> Array:
    """Square root of x >= 0 whose gradient at 0 is 0, not infinite."""
    positive = x > jnp.finfo(x.dtype).tiny
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def product_energy(u: Array, v: Array) -> Array:
    """`||u v||_F^2`, never negative.

    Whichever is smaller is formed: two Gram matrices `[m, m]`, since the energy is the sum over i, j of
    `(u_i . u_j) (v_i . v_j)` with columns u_i and rows v_i, or the product `[n, p]`. Shapes decide, at trace time.

    Args:
      u: `[..., n, m]`.
      v: `[..., m, p]`.

    Returns:
      `[...]`.
    """
    n, m, p = *u.shape[-2:], v.shape[-1]
    if m * m <= n * p:
        return jnp.maximum(jnp.sum(gram(u) * gram(jnp.swapaxes(v, -1, -2)), axis=(-2, -1)), 0.0)
    product = jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(product * product, axis=(-2, -1))


def differences(factors: dict[str, Factors], others: dict[str, Factors]) -> dict[str, Factors]:
    """`a b - a' b'` of every module as one product, of twice the components: `[a - a' | a']` and `[b ; b - b']`.

    It vanishes exactly where the factors agree, and a small one is not lost between two large products.
    """
    found = {}
    for name, f in factors.items():
        other = others[name]
        found[name] = Factors(
            a=jnp.concatenate([f.a - other.a, other.a], axis=-1), b=jnp.concatenate([f.b, f.b - other.b], axis=-2)
        )
    return found
