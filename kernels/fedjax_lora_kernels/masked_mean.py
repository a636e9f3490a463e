"""Weighted sums of many clients' factors, each rank with a weight of its own, read from memory once."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from fedjax_lora_kernels.small import column, number
from fedjax_lora_kernels.targets import LANES, Target, cost, options, power_of_two, stretch

MAX_CLIENTS = 64
"""Most clients that one program adds up."""

BLOCK_BYTES = 2**21
"""Of all clients' numbers that one program of a TPU holds."""


def _clients(block_clients: int, clients: int) -> Array:
    """How many clients this program has: fewer at the end, where its block hangs over the edge."""
    return jnp.minimum(block_clients, clients - pl.program_id(2) * block_clients)


def _masked(x_ref, old_ref, weight_ref, sum_ref, *, clients: int) -> None:
    old = old_ref[...]

    def add(client: Array, total: Array) -> Array:
        weight = column(weight_ref[pl.ds(client, 1), :])
        return total + weight * (x_ref[client] - old)

    sum_ref[...] = lax.fori_loop(0, _clients(x_ref.shape[0], clients), add, jnp.zeros_like(old))


def _packed(x_ref, index_ref, weight_ref, sum_ref, *, clients: int) -> None:
    slots, (ranks, _) = x_ref.shape[1], sum_ref.shape
    rank, slot = number((ranks, slots), 0), number((ranks, slots), 1)

    def add(client: Array, total: Array) -> Array:
        index, weight = index_ref[pl.ds(client, 1), :], weight_ref[pl.ds(client, 1), :]

        def place(number: Array, total: Array) -> Array:
            of_rank = jnp.where((rank == index) & (slot == number), weight, 0.0)
            return total + jnp.sum(of_rank, axis=1, keepdims=True) * x_ref[client, pl.ds(number, 1), :]

        return lax.fori_loop(0, slots, place, total)

    sum_ref[...] = lax.fori_loop(0, _clients(x_ref.shape[0], clients), add, jnp.zeros(sum_ref.shape))


@functools.partial(jax.jit, static_argnames=("target",))
def masked_mean(old: Array, x: Array, weights: Array, *, target: Target) -> Array:
    """`old + sum over c of w_c (x_c - old)`, each rank with its own weights.

    One program adds up the changes of some clients for one matrix and stretch of its width; where there are several
    such groups of clients, their sums are added outside, so no order between programs is assumed.

    Floor: every client's factors read once, 4 bytes and 3 FLOP a number.

    Args:
      old: `[M, R, n]`, the ranks of M matrices.
      x: `[C, M, R, n]`.
      weights: `[C, M, R]`.
      target: what it is compiled for; a GPU wants a power of two as R.

    Returns:
      `[M, R, n]`.
    """
    return old + _sums(_masked, x, old, weights, old.shape[1], target)


@functools.partial(jax.jit, static_argnames=("target",))
def packed_mean(old: Array, x: Array, index: Array, weights: Array, *, target: Target) -> Array:
    """`old + sum over c of w_cj x_cj` at the rank that `index_cj` names, over the slots j of each client.

    Floor: every client's slots read once, 4 bytes and 2 FLOP a number; a slot is spread over all R ranks, so that the
    arithmetic is R times as much.

    Args:
      old: `[M, R, n]`, the ranks of M matrices.
      x: `[C, M, k, n]` changes.
      index: `[C, M, k]` int32, the rank of each slot; -1 for an empty one.
      weights: `[C, M, k]`.
      target: what it is compiled for; a GPU wants powers of two as R and k.

    Returns:
      `[M, R, n]`.
    """
    return old + _sums(_packed, x, index, weights, old.shape[1], target)


def _sums(kernel, x: Array, second: Array, weights: Array, ranks: int, target: Target) -> Array:
    """The kernel over groups of clients, matrices and stretches of the width; `[M, R, n]`."""
    clients, matrices, slots, width = x.shape
    together = min(clients, MAX_CLIENTS)
    if target == "tpu":
        rows = together * max(slots, 8)
        block = stretch(width, max(BLOCK_BYTES // (4 * rows), LANES))
    else:
        block = power_of_two(width, 256)
    grid = (matrices, pl.cdiv(width, block), pl.cdiv(clients, together))
    row = pl.BlockSpec((None, together, slots), lambda matrix, i, group: (matrix, group, 0))
    if kernel is _packed:
        second, of_second = second.swapaxes(0, 1), row
    else:
        of_second = pl.BlockSpec((None, ranks, block), lambda matrix, i, group: (matrix, 0, i))
    out = jax.ShapeDtypeStruct((grid[2], matrices, ranks, width), x.dtype)
    each = 3 if kernel is _masked else 2 * ranks
    sums = pl.pallas_call(
        functools.partial(kernel, clients=clients),
        out_shape=out,
        grid=grid,
        in_specs=[
            pl.BlockSpec((together, None, slots, block), lambda matrix, i, group: (group, matrix, 0, i)),
            of_second,
            row,
        ],
        out_specs=pl.BlockSpec((None, None, ranks, block), lambda matrix, i, group: (group, matrix, 0, i)),
        cost_estimate=cost(each * x.size, (x, second, weights, out)),
        name=kernel.__name__.strip("_") + "_mean",
        **options(target),
    )(x, second, weights.swapaxes(0, 1))
    return jnp.sum(sums, axis=0)
