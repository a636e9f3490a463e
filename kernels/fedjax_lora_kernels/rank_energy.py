"""Per-rank energies of a factor and of its change, read from memory once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from fedjax_lora_kernels.targets import Target, cost, options, power_of_two

MAX_BLOCK = 1024
"""Longest stretch of the reduced axis that one program of a GPU reads."""


def _kernel(x_ref, x0_ref, change_ref, mean_ref, cross_ref, *, axis: int) -> None:
    x, x0 = x_ref[...], x0_ref[...]
    change, mean = x - x0, 0.5 * (x + x0)
    change_ref[...] = jnp.sum(change * change, axis)[None]
    mean_ref[...] = jnp.sum(mean * mean, axis)[None]
    cross_ref[...] = jnp.sum(change * mean, axis)[None]


@functools.partial(jax.jit, static_argnames=("axis", "target"))
def rank_energy(x: Array, x0: Array, *, axis: int, target: Target) -> tuple[Array, Array, Array]:
    """`|x - x0|^2`, `|(x + x0) / 2|^2` and their dot product, for each rank.

    Each program reads one block of both factors in the layout in which they are stored and writes its partial
    sums; the few partial sums are added outside, so no order between programs is assumed.

    Floor: both factors read once, 8 bytes a number of either, and 8 FLOP. A TPU pads the last axis to 128: with axis
    -2 it reads 128 / R times as much, so that factors should lie with their width last there.

    Args:
      x: `[..., n, R]` with axis -2, or `[..., R, n]` with axis -1.
      x0: the same shape.
      axis: which axis is n and is summed, -2 or -1.
      target: what it is compiled for; a GPU wants a power of two as R.

    Returns:
      Three arrays `[..., R]`.
    """
    *leading, rows, columns = x.shape
    length, ranks = (rows, columns) if axis == -2 else (columns, rows)
    block = length if target == "tpu" else power_of_two(length, MAX_BLOCK)
    grid = (math.prod(leading), length // block)
    if axis == -2:
        factor = pl.BlockSpec((None, block, ranks), lambda layer, i: (layer, i, 0))
    else:
        factor = pl.BlockSpec((None, ranks, block), lambda layer, i: (layer, 0, i))
    partial = pl.BlockSpec((None, None, 1, ranks), lambda layer, i: (layer, i, 0, 0))
    out = [jax.ShapeDtypeStruct((*grid, 1, ranks), x.dtype)] * 3
    sums = pl.pallas_call(
        functools.partial(_kernel, axis=axis),
        out_shape=out,
        grid=grid,
        in_specs=[factor, factor],
        out_specs=[partial] * 3,
        cost_estimate=cost(8 * x.size, (x, x0, *out)),
        name="rank_energy",
        **options(target),
    )(x.reshape(-1, rows, columns), x0.reshape(-1, rows, columns))
    change, mean, cross = (jnp.sum(s, axis=(1, 2)).reshape(*leading, ranks) for s in sums)
    return change, mean, cross
