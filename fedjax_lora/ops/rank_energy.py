"""Energies of a factor's rank components and of their change: what importance needs of one factor."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from fedjax_lora.ops.implementations import Implementation, chosen, with_gradients_of
from fedjax_lora_kernels import rank_energy as kernel
from fedjax_lora_kernels.targets import Target


class RankEnergy(NamedTuple):
    """Per-rank sums over a factor's width, for the change `x - x0` and the midpoint `(x + x0) / 2`.

    Squares of x and of x0 would do as well on paper, but the energy of a small change would then be the
    difference of two large numbers, and float32 would lose it.

    change: `[..., R]` squared norm of the change.
    mean: `[..., R]` squared norm of the midpoint.
    cross: `[..., R]` dot product of the two.
    """

    change: Array
    mean: Array
    cross: Array


def rank_energy(
    x: Array, x0: Array, *, axis: Literal[-2, -1], implementation: Implementation | None = None
) -> RankEnergy:
    """Energies of each rank of a factor and of its change; differentiable in both.

    Args:
      x: `[..., n, R]` with axis -2, or `[..., R, n]` with axis -1.
      x0: the same shape: where x started from.
      axis: which axis is the width n and is summed.
      implementation: `xla` is the reference, and what None stands for; `pallas` reads each factor once.
    """
    if x.shape != x0.shape:
        raise ValueError(f"x0 must have the shape of x, {x.shape}, got {x0.shape}")
    if axis not in (-2, -1):
        raise ValueError(f"axis must be -2 or -1, got {axis!r}")
    reference = functools.partial(_reference, axis=axis)
    if chosen(implementation) == "xla":
        return reference(x, x0)
    return with_gradients_of(reference, functools.partial(_by_kernel, axis=axis))(x, x0)


def _reference(x: Array, x0: Array, axis: int) -> RankEnergy:
    change, mean = x - x0, 0.5 * (x + x0)
    return RankEnergy(
        change=jnp.sum(change * change, axis), mean=jnp.sum(mean * mean, axis), cross=jnp.sum(change * mean, axis)
    )


def _by_kernel(x: Array, x0: Array, *, axis: int, target: Target) -> RankEnergy:
    return RankEnergy(*kernel.rank_energy(x, x0, axis=axis, target=target))
