"""Energies of a factor's rank components and of their change: what importance needs of one factor."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.ops.implementations import Implementation, chosen, with_gradients_of
from fedjax_lora_kernels import rank_energy as kernel
from fedjax_lora_kernels.targets import Target

ROWS = 16
"""Rows that a CPU adds at once, or the next fewer that divide the width: so many its compiler unrolls."""


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
    """Energies of each rank of a factor and of its change; differentiable in both, backward.

    Args:
      x: `[..., n, R]` with axis -2, or `[..., R, n]` with axis -1.
      x0: the same shape: where x started from.
      axis: which axis is the width n and is summed.
      implementation: `xla`, which None stands for, or `pallas`, which reads each factor once.
    """
    if x.shape != x0.shape:
        raise ValueError(f"x0 must have the shape of x, {x.shape}, got {x0.shape}")
    if axis not in (-2, -1):
        raise ValueError(f"axis must be -2 or -1, got {axis!r}")
    found = _by_xla if chosen(implementation) == "xla" else _by_kernel
    return with_gradients_of(functools.partial(_reference, axis=axis), functools.partial(found, axis=axis))(x, x0)


def _terms(x: Array, x0: Array) -> tuple[Array, Array, Array]:
    change, mean = x - x0, 0.5 * (x + x0)
    return change * change, mean * mean, change * mean


def _reference(x: Array, x0: Array, axis: int) -> RankEnergy:
    return RankEnergy(*(jnp.sum(term, axis) for term in _terms(x, x0)))


def _by_xla(x: Array, x0: Array, *, axis: int, target: Target) -> RankEnergy:
    """The reference; on a CPU as one sum of three numbers at a time, of ROWS rows and then of what is left.

    XLA makes a pass for each of three sums there, and of one long sum no vector.
    """
    if target != "cpu" or not x.dtype == x0.dtype == jnp.float32:
        return _reference(x, x0, axis)
    place, width = x.ndim + axis, x.shape[axis]
    rows = next((rows for rows in range(ROWS, 1, -1) if width % rows == 0), width)
    folded = (*x.shape[:place], rows, width // rows, *x.shape[place + 1 :])

    def add(sums: tuple[Array, ...], terms: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    terms = _terms(x.reshape(folded), x0.reshape(folded))
    sums = lax.reduce(terms, (jnp.float32(0.0),) * 3, add, (place,))
    return RankEnergy(*(jnp.sum(part, axis) for part in sums))


def _by_kernel(x: Array, x0: Array, *, axis: int, target: Target) -> RankEnergy:
    return RankEnergy(*kernel.rank_energy(x, x0, axis=axis, target=target))
