"""Weighted averages of all clients' factors, in which each rank of each client has a weight of its own."""

import functools
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.ops.implementations import Implementation, chosen, with_gradients_of
from fedjax_lora_kernels import masked_mean as kernel
from fedjax_lora_kernels.targets import Target


def masked_mean(
    old: Array, x: Array, weights: Array, *, axis: Literal[-2, -1], implementation: Implementation | None = None
) -> Array:
    """`old + sum over c of w_c (x_c - old)`, rank by rank.

    Of changes, not of values: copies of `old` then give `old` to the last bit.

    Args:
      old: `[..., n, R]` with axis -2, or `[..., R, n]` with axis -1.
      x: `[C, *old.shape]`.
      weights: `[C, ..., R]`, w.
      axis: which axis is the width n, along which a rank has one weight.
      implementation: `xla` is the reference, and what None stands for; `pallas` reads x once.

    Returns:
      The shape of `old`.
    """
    if x.shape[1:] != old.shape:
        raise ValueError(f"x must have the shape {('C', *old.shape)}, got {x.shape}")
    if axis not in (-2, -1):
        raise ValueError(f"axis must be -2 or -1, got {axis!r}")
    if chosen(implementation) == "xla":
        return _masked(old, x, weights, axis)
    call = with_gradients_of(functools.partial(_masked, axis=axis), functools.partial(_masked_kernel, axis=axis))
    return call(old, x, weights)


def packed_mean(
    old: Array, x: Array, index: Array, weights: Array, *, implementation: Implementation | None = None
) -> Array:
    """`old + sum over c and j of w_cj x_cj` at the rank that `index_cj` names: changes as `soft_sparsify` packs them.

    Args:
      old: `[..., R, n]`.
      x: `[C, ..., k, n]`, changes.
      index: `[C, ..., k]` int32, the rank of each slot; -1 for an empty one.
      weights: `[C, ..., k]`, w.
      implementation: `xla` is the reference, and what None stands for; `pallas` reads x once.

    Returns:
      `[..., R, n]`.
    """
    if chosen(implementation) == "xla":
        return _packed(old, x, index, weights)
    return with_gradients_of(_packed, _packed_kernel)(old, x, index, weights)


def _masked(old: Array, x: Array, weights: Array, axis: int) -> Array:
    return old + jnp.sum(jnp.expand_dims(weights, axis) * (x - old), axis=0)


def _masked_kernel(old: Array, x: Array, weights: Array, *, axis: int, target: Target) -> Array:
    if axis == -2:
        old, x = old.swapaxes(-1, -2), x.swapaxes(-1, -2)
    clients, shape = x.shape[0], old.shape
    found = kernel.masked_mean(
        old.reshape(-1, *shape[-2:]),
        x.reshape(clients, -1, *shape[-2:]),
        weights.reshape(clients, -1, shape[-2]),
        target=target,
    ).reshape(shape)
    return found.swapaxes(-1, -2) if axis == -2 else found


def _packed(old: Array, x: Array, index: Array, weights: Array) -> Array:
    rank = jnp.arange(old.shape[-2])
    placed = jnp.where(index[..., None, :] == rank[:, None], weights[..., None, :], 0.0)  # [C, ..., R, k]
    return old + jnp.einsum("c...rk,c...kn->...rn", placed, x, precision="highest")


def _packed_kernel(old: Array, x: Array, index: Array, weights: Array, *, target: Target) -> Array:
    clients, slots = x.shape[0], x.shape[-2]
    return kernel.packed_mean(
        old.reshape(-1, *old.shape[-2:]),
        x.reshape(clients, -1, slots, x.shape[-1]),
        index.reshape(clients, -1, slots),
        weights.reshape(clients, -1, slots),
        target=target,
    ).reshape(old.shape)
