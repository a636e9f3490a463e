"""The orthogonal components of factors' changes: eigenvectors of their Gram matrices, many at a time."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fedjax_lora.ops import factorise
from fedjax_lora.ops.implementations import Implementation, chosen
from fedjax_lora.ops.products import gram
from fedjax_lora_kernels import rotate_ranks as kernel
from fedjax_lora_kernels.targets import on_its_platform


class Rotated(NamedTuple):
    """The orthogonal components of a stack of changes.

    energies: `[L, R]` squared norms, the largest first. rotation: `[L, R, R]`, the components as columns.
    """

    energies: Array
    rotation: Array


def rotate_ranks(
    changes: Sequence[Array], rank_mask: Array, *, implementation: Implementation | None = None
) -> list[Rotated]:
    """The orthogonal components of every change.

    Signs, and the order among equal energies, are the implementation's own.

    Args:
      changes: `[L, n, R]` each, of any L and n; 0 in ranks that are not in use.
      rank_mask: `[R]`, 1 for those in use; the others come last.
      implementation: `xla` is the reference, and what None stands for: batched eigenvectors, on a CPU LAPACK's;
        `pallas` forms and diagonalises the Gram matrices of each width in one launch, R at most 64.
    """
    if chosen(implementation) == "xla":
        return _reference(changes, rank_mask)
    found: dict[int, Rotated] = {}
    for width in {change.shape[-2] for change in changes}:
        same = [i for i, change in enumerate(changes) if change.shape[-2] == width]
        together = jnp.concatenate([jnp.swapaxes(changes[i], -1, -2) for i in same])
        ranks = jnp.broadcast_to(rank_mask, (together.shape[0], rank_mask.shape[0]))
        parts = _split(on_its_platform(kernel.rotate_ranks, together, ranks), [changes[i] for i in same])
        found.update(zip(same, parts, strict=True))
    return [found[i] for i in range(len(changes))]


def _reference(changes: Sequence[Array], rank_mask: Array) -> list[Rotated]:
    grams = jnp.concatenate([gram(change) for change in changes])
    energy = jnp.trace(grams, axis1=-2, axis2=-1)[:, None]
    # At unit trace, accuracy is the same at every scale of the change. Unused ranks move from eigenvalue 0 to -1:
    # they come last even if a rank in use has not changed.
    scaled = grams / jnp.where(energy > 0, energy, 1.0)[..., None] - jnp.diag(1.0 - rank_mask)
    values, vectors = factorise.eigh(scaled)
    energies, rotations = jnp.maximum(values[:, ::-1], 0.0) * energy, vectors[..., ::-1]
    return _split((energies, rotations), changes)


def _split(both: tuple[Array, Array], changes: Sequence[Array]) -> list[Rotated]:
    ends = list(itertools.accumulate(change.shape[0] for change in changes))[:-1]
    return [Rotated(*part) for part in zip(*(jnp.split(each, ends) for each in both), strict=True)]
