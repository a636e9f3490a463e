"""Per-rank energies of a factor and of its change, read from memory once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

MAX_BLOCK = 1024
"""Longest stretch of the reduced axis that one program reads."""


def _kernel(x_ref, x0_ref, change_ref, mean_ref, cross_ref, *, axis: int) -> None:
    x, x0 = x_ref[...], x0_ref[...]
    change, mean = x - x0, 0.5 * (x + x0)
    change_ref[...] = jnp.sum(change * change, axis)[None]
    mean_ref[...] = jnp.sum(mean * mean, axis)[None]
    cross_ref[...] = jnp.sum(change * mean, axis)[None]


@functools.partial(jax.jit, static_argnames=("axis", "interpret"))
def rank_energy(x: Array, x0: Array, *, axis: int, interpret: bool = False) -> tuple[Array, Array, Array]:
    """`|x - x0|^2`, `|(x + x0) / 2|^2` and their dot product, for each rank.

    Each program reads one block of both factors in the layout in which they are stored and writes its partial
    sums; the few partial sums are added outside, so no order between programs is assumed.

    Args:
      x: `[..., n, R]` with axis -2, or `[..., R, n]` with axis -1.
      x0: the same shape.
      axis: which axis is n and is summed, -2 or -1.
      interpret: run by the Pallas interpreter, for a device without a compiler.

    Returns:
      Three arrays `[..., R]`.
    """
    *leading, rows, columns = x.shape
    length, ranks = (rows, columns) if axis == -2 else (columns, rows)
    # A power of two that divides the length: no block hangs over the edge, so nothing needs a mask.
    block = math.gcd(length, MAX_BLOCK)
    grid = (math.prod(leading), length // block)
    if axis == -2:
        factor = pl.BlockSpec((None, block, ranks), lambda layer, i: (layer, i, 0))
    else:
        factor = pl.BlockSpec((None, ranks, block), lambda layer, i: (layer, 0, i))
    partial = pl.BlockSpec((None, None, 1, ranks), lambda layer, i: (layer, i, 0, 0))
    sums = pl.pallas_call(
        functools.partial(_kernel, axis=axis),
        out_shape=[jax.ShapeDtypeStruct((*grid, 1, ranks), x.dtype)] * 3,
        grid=grid,
        in_specs=[factor, factor],
        out_specs=[partial] * 3,
        interpret=interpret,
        name="rank_energy",
    )(x.reshape(-1, rows, columns), x0.reshape(-1, rows, columns))
    change, mean, cross = (jnp.sum(s, axis=(1, 2)).reshape(*leading, ranks) for s in sums)
    return change, mean, cross
