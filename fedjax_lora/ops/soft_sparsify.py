"""What many clients send of their changes by SOFT: the components of largest importance, masked or packed."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Factors
from fedjax_lora.ops.implementations import Implementation, chosen, with_gradients_of
from fedjax_lora.ops.places import descending_places
from fedjax_lora.ops.products import safe_sqrt
from fedjax_lora.ops.rank_energy import rank_energy
from fedjax_lora_kernels import soft_sparsify as kernel
from fedjax_lora_kernels.targets import Target

VALUE_BITS = 32


class Sparse(NamedTuple):
    """What is sent of C clients' changes of one module of L layers.

    a, b: changes, zero where nothing is sent: `[C, L, n_in, R]` and `[C, L, R, n_out]` in their places; packed,
      `[C, L, k, n_in]` and `[C, L, k, n_out]`, the most important first.
    chosen: `[C, L, R]` float32 mask; packed, `[C, L, k]` int32 rank of each slot, -1 for an empty one.
    importance: `[C, L, R]`, see `sparsifiers.soft.importance`.
    kept_energy, dropped_energy: `[C, L]` sums of squared importances of the ranks in use.
    bits: `[C, L]` uint32, values of 32 bits and the index.
    """

    a: Array
    b: Array
    chosen: Array
    importance: Array
    kept_energy: Array
    dropped_energy: Array
    bits: Array


def change_energy(a: Array, b: Array, a0: Array, b0: Array) -> Array:
    """`[..., R]` squared norms of the changes `a_i b_i - a0_i b0_i`, see `sparsifiers.soft.importance`."""
    of_a, of_b = rank_energy(a, a0, axis=-2), rank_energy(b, b0, axis=-1)
    return of_a.change * of_b.mean + of_a.mean * of_b.change + 2.0 * of_a.cross * of_b.cross


def soft_sparsify(
    trained: Factors,
    start: Factors,
    kept: Array,
    ranks: Array,
    *,
    slots: int | None = None,
    implementation: Implementation | None = None,
) -> Sparse:
    """The k most important components of each matrix of each client, and what they cost.

    Of equal ones the first wins. The choice has no gradient; changes and importance have theirs.

    Args:
      trained: `a [C, L, n_in, R]`, `b [C, L, R, n_out]`.
      start: `a [L, n_in, R]`, `b [L, R, n_out]`, where all started from.
      kept: `[C]` float32, how many components of each matrix, k; those in use at most.
      ranks: `[C, R]`, 1 for those in use.
      slots: None for changes in their places; else room for so many packed ones a matrix: no more are kept.
      implementation: `xla` is the reference, and what None stands for; `pallas` reads and writes once.
    """
    size = trained.a.shape[-1]
    if start.a.shape != trained.a.shape[1:] or start.b.shape != trained.b.shape[1:]:
        raise ValueError(f"start must have the shapes of one client, got {start.a.shape} and {start.b.shape}")
    if slots is not None and not 1 <= slots <= size:
        raise ValueError(f"slots must be None or from 1 to {size}, got {slots}")
    kept = jnp.minimum(jnp.floor(kept), size if slots is None else slots)
    arrays = (trained.a, trained.b, start.a, start.b, kept, ranks)
    if chosen(implementation) == "xla":
        a, b, which, importance = _reference(*arrays, slots=slots)
    else:
        of = with_gradients_of(functools.partial(_reference, slots=slots), functools.partial(_by_kernel, slots=slots))
        a, b, which, importance = of(*arrays)
    widths = trained.a.shape[-2] + trained.b.shape[-1]
    return _counted(a, b, which, importance, ranks, widths, slots)


def _counted(
    a: Array, b: Array, which: Array, importance: Array, ranks: Array, widths: int, slots: int | None
) -> Sparse:
    """Energies and bits, from what is chosen."""
    size = importance.shape[-1]
    if slots is None:
        mask = which
    else:
        mask = jnp.sum(jnp.where(which[..., None] == jnp.arange(size), 1.0, 0.0), axis=-2)
        which = which.astype(jnp.int32)
    energy = jnp.where(ranks[:, None] > 0, importance * importance, 0.0)
    count = jnp.sum(mask, axis=-1).astype(jnp.uint32)
    index = jnp.minimum(jnp.uint32(size), count * jnp.uint32((size - 1).bit_length()))
    return Sparse(
        a=a,
        b=b,
        chosen=which,
        importance=importance,
        kept_energy=jnp.sum(energy * mask, axis=-1),
        dropped_energy=jnp.sum(energy * (1.0 - mask), axis=-1),
        bits=count * jnp.uint32(VALUE_BITS * widths) + index,
    )


def _reference(
    a: Array, b: Array, a0: Array, b0: Array, kept: Array, ranks: Array, *, slots: int | None
) -> tuple[Array, Array, Array, Array]:
    start = jnp.broadcast_to(a0, a.shape), jnp.broadcast_to(b0, b.shape)
    importance = safe_sqrt(jnp.maximum(change_energy(a, b, *start), 0.0))
    in_use = ranks[:, None] > 0
    scores = jnp.where(in_use, importance, -1.0)
    taken = (descending_places(scores) < kept[:, None, None]) & in_use
    if slots is None:
        which = taken.astype(jnp.float32)
        sent_a, sent_b = jnp.where(taken[..., None, :], a - a0, 0.0), jnp.where(taken[..., None], b - b0, 0.0)
        return sent_a, sent_b, which, importance
    first = jnp.argsort(scores, axis=-1, stable=True, descending=True)[..., :slots]
    full = jnp.take_along_axis(taken, first, axis=-1)
    sent_a, sent_b = (
        jnp.where(full[..., None], jnp.take_along_axis(change, first[..., None], axis=-2), 0.0)
        for change in (jnp.swapaxes(a - a0, -1, -2), b - b0)
    )
    return sent_a, sent_b, jnp.where(full, first, -1).astype(jnp.float32), importance


def _by_kernel(
    a: Array, b: Array, a0: Array, b0: Array, kept: Array, ranks: Array, *, slots: int | None, target: Target
) -> tuple[Array, Array, Array, Array]:
    by_rank = jnp.swapaxes(a, -1, -2), b, jnp.swapaxes(a0, -1, -2), b0
    sent_a, sent_b, which, importance = kernel.soft_sparsify(*by_rank, kept, ranks, slots=slots, target=target)
    return sent_a if slots is not None else jnp.swapaxes(sent_a, -1, -2), sent_b, which, importance
