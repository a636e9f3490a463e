"""Factorisations of stacks of small matrices: eigenvalues, QR, singular values, and random orthonormal columns.

On a CPU each matrix is a call of its own, also under `vmap`. XLA hands the matrices of a batched call to the threads
that its other work runs on and waits for them; two such calls at once, on two devices or side by side in one program,
can each wait for threads that the other holds, for ever. Elsewhere a stack is one batched call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues `[..., n]`, ascending, and eigenvectors as columns `[..., n, n]` of symmetric `[..., n, n]`."""
    return _each(lambda one: tuple(jnp.linalg.eigh(one)), "(n,n)->(n),(n,n)")(x)


def qr(x: Array) -> tuple[Array, Array]:
    """Orthonormal columns `[..., n, m]` and upper triangle `[..., m, m]` of `[..., n, m]`, n >= m."""
    return _each(lambda one: tuple(jnp.linalg.qr(one)), "(n,m)->(n,m),(m,m)")(x)


def svd(x: Array) -> tuple[Array, Array, Array]:
    """`u [..., n, k]`, `s [..., k]`, descending, and `vt [..., k, m]` of `[..., n, m]`, k = min(n, m)."""
    k = min(x.shape[-2:])
    return _each(lambda one: tuple(jnp.linalg.svd(one, full_matrices=False)), f"(n,m)->(n,{k}),({k}),({k},m)")(x)


def orthonormal(key: Array, shape: tuple[int, int, int]) -> Array:
    """`[L, n, m]` matrices with orthonormal columns, n >= m: the Q of Gaussian ones.

    Args:
      key: consumed.
      shape: L, n, m.
    """
    return qr(jax.random.normal(key, shape))[0]


def _each(one: Callable, signature: str) -> Callable:
    """A function of one matrix as one of a stack."""

    def stacked(x: Array) -> tuple[Array, ...]:
        return jax.lax.platform_dependent(
            x,
            cpu=jnp.vectorize(sequential_vmap(one), signature=signature),
            default=jnp.vectorize(one, signature=signature),
        )

    return stacked
