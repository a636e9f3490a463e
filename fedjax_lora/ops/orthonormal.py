"""Random matrices with orthonormal columns."""

import jax
import jax.numpy as jnp
from jax import Array


def orthonormal(key: Array, shape: tuple[int, int, int]) -> Array:
    """`[L, n, m]` matrices with orthonormal columns, n >= m: the Q of Gaussian ones.

    Args:
      key: consumed.
      shape: L, n, m.
    """
    # A matrix at a time: batched factorisations that run side by side can starve XLA's CPU threads, each waiting for
    # tasks that only the other could run.
    return jax.lax.map(lambda x: jnp.linalg.qr(x)[0], jax.random.normal(key, shape))
