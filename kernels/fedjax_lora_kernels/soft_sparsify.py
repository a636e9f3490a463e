"""SOFT for many clients at once: importance, the top k and what is sent, in one pass over the factors."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from fedjax_lora_kernels.small import column, number, position, row
from fedjax_lora_kernels.targets import Target, cost, options, power_of_two

MAX_BLOCK = 256
"""Longest stretch of the width that a program of a GPU holds in its registers."""


def _stretches(ref, block: int, visit, first):
    """`visit(slice of the width, carry)` over the width, `block` at a time."""
    count = ref.shape[-1] // block
    if count == 1:
        return visit(slice(None), first)
    return lax.fori_loop(0, count, lambda i, carry: visit(pl.ds(i * block, block), carry), first)


def _energies(x_ref, x0_ref, block: int) -> tuple[Array, Array, Array]:
    """`[R, 1]` energies of the change, of the midpoint, and their dot product."""

    def add(where, sums):
        x, x0 = x_ref[:, where], x0_ref[:, where]
        change, mean = x - x0, 0.5 * (x + x0)
        terms = change * change, mean * mean, change * mean
        return tuple(old + jnp.sum(term, axis=1, keepdims=True) for old, term in zip(sums, terms, strict=True))

    return _stretches(x_ref, block, add, (jnp.zeros((x_ref.shape[0], 1)),) * 3)


def _kernel(
    a_ref,
    b_ref,
    a0_ref,
    b0_ref,
    kept_ref,
    ranks_ref,
    sent_a_ref,
    sent_b_ref,
    chosen_ref,
    importance_ref,
    *,
    blocks,
    slots,
) -> None:
    factors = (a_ref, a0_ref, sent_a_ref, blocks[0]), (b_ref, b0_ref, sent_b_ref, blocks[1])
    (change_a, mean_a, cross_a), (change_b, mean_b, cross_b) = (
        _energies(x_ref, x0_ref, block) for x_ref, x0_ref, _, block in factors
    )
    in_use = column(ranks_ref[...]) > 0.0
    energy = jnp.maximum(change_a * mean_b + mean_a * change_b + 2.0 * cross_a * cross_b, 0.0)
    positive = energy > jnp.finfo(energy.dtype).tiny
    importance = jnp.where(positive, jnp.sqrt(jnp.where(positive, energy, 1.0)), 0.0)
    importance_ref[...] = row(importance)
    place = position(jnp.where(in_use, importance, -1.0))
    chosen = (place < kept_ref[...]) & in_use
    size = importance.shape[0]
    if slots is None:
        chosen_ref[...] = row(jnp.where(chosen, 1.0, 0.0))
    else:
        taken = chosen & (place == number((size, slots), 1).astype(place.dtype))
        found = jnp.where(taken, number((size, slots), 0).astype(place.dtype) + 1.0, 0.0)
        chosen_ref[...] = jnp.sum(found, axis=0, keepdims=True) - 1.0
    for x_ref, x0_ref, sent_ref, block in factors:

        def send(where, carry, x_ref=x_ref, x0_ref=x0_ref, sent_ref=sent_ref):
            change = x_ref[:, where] - x0_ref[:, where]
            if slots is None:
                sent_ref[:, where] = jnp.where(chosen, change, 0.0)
                return carry

            def fill(slot: Array, carry):
                here = chosen & (place == slot.astype(place.dtype))
                sent_ref[pl.ds(slot, 1), where] = jnp.sum(jnp.where(here, change, 0.0), axis=0, keepdims=True)
                return carry

            return lax.fori_loop(0, slots, fill, carry)

        _stretches(x_ref, block, send, 0)


@functools.partial(jax.jit, static_argnames=("slots", "target"))
def soft_sparsify(
    a: Array, b: Array, a0: Array, b0: Array, kept: Array, ranks: Array, *, slots: int | None, target: Target
) -> tuple[Array, Array, Array, Array]:
    """What of their changes the clients send: of each matrix the components of largest importance.

    One program has one matrix of one client: it reads the factors once, holds them, and writes what is sent once. A
    GPU reads them a second time, from its cache.

    Floor: 4 bytes of every number of `a` and `b`, and of every number that is written; 13 FLOP a number.

    Args:
      a, b: `[C, M, R, n_in]` and `[C, M, R, n_out]`, the ranks of M matrices of each client.
      a0, b0: `[M, R, n_in]` and `[M, R, n_out]`: where all clients started from.
      kept: `[C]` float32, how many components to keep.
      ranks: `[C, R]`, 1 for those in use.
      slots: None for changes in their places; else how many a matrix are packed, the most important first.
      target: what it is compiled for; a GPU wants a power of two as R and as the number of slots.

    Returns:
      Changes of a and of b, `[C, M, R or slots, n]`, zero where nothing is sent; which these are, float32: a mask
      `[C, M, R]`, or the rank of each slot `[C, M, slots]`, -1 for an empty one; importance `[C, M, R]`.
    """
    clients, matrices, size, _ = a.shape
    rows, widths = size if slots is None else slots, (a.shape[-1], b.shape[-1])
    blocks = widths if target == "tpu" else tuple(power_of_two(width, MAX_BLOCK) for width in widths)
    of_start = [pl.BlockSpec((None, size, width), lambda client, matrix: (matrix, 0, 0)) for width in widths]
    of_client = [pl.BlockSpec((None, 1, width), lambda client, matrix: (client, 0, 0)) for width in (1, size)]

    def of_matrix(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda client, matrix: (client, matrix, 0, 0))

    out = [
        jax.ShapeDtypeStruct((clients, matrices, *shape), a.dtype)
        for shape in ((rows, widths[0]), (rows, widths[1]), (1, rows), (1, size))
    ]
    sent_a, sent_b, chosen, importance = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, slots=slots),
        out_shape=out,
        grid=(clients, matrices),
        in_specs=[*(of_matrix(size, width) for width in widths), *of_start, *of_client],
        out_specs=[*(of_matrix(rows, width) for width in widths), of_matrix(1, rows), of_matrix(1, size)],
        cost_estimate=cost(13 * (a.size + b.size), (a, b, a0, b0, *out), roots=clients * matrices * size),
        name="soft_sparsify",
        **options(target),
    )(a, b, a0, b0, kept[:, None, None], ranks[:, None, :])
    return sent_a, sent_b, chosen[:, :, 0], importance[:, :, 0]
