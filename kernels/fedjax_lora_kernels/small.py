"""What kernels do with the R numbers of a matrix, in forms that the compilers of TPUs and GPUs both take."""

import jax.numpy as jnp
from jax import Array, lax


def number(shape: tuple[int, int], axis: int) -> Array:
    """int32: each place's number along the axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def diagonal(size: int) -> Array:
    """`[size, size]` bool, True on the diagonal."""
    return number((size, size), 0) == number((size, size), 1)


def row(column: Array) -> Array:
    """`[1, R]` of `[R, 1]`."""
    return jnp.sum(jnp.where(diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def column(row: Array) -> Array:
    """`[R, 1]` of `[1, R]`."""
    return jnp.sum(jnp.where(diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def position(values: Array) -> Array:
    """`[R, 1]` float32 places of the values `[R, 1]` when the largest comes first; the first of equals wins."""
    size, others = values.shape[0], row(values)
    earlier = number((size, size), 1) < number((size, size), 0)
    before = (others > values) | ((others == values) & earlier)
    return jnp.sum(jnp.where(before, 1.0, 0.0), axis=1, keepdims=True)
