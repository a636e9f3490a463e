"""What components and the head cost: exact counts of bits, in uint32.

A module has L matrices of each factor, and a component of one layer costs `n_in + n_out` values. Widths differ
between modules (grouped-query attention), hence a count for every module. Heads are charged in full.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.base import Adapters, Factors

BITS_PER_VALUE = 32


def width(factors: Factors) -> int:
    """Values in one component of one layer, `n_in + n_out`."""
    return factors.a.shape[-2] + factors.b.shape[-1]


def component_bits(count: Array, factors: Factors, extra_values: int = 0) -> Array:
    """Bits of `count` (uint32) components of a module, each sent with `extra_values` more values."""
    return count * jnp.uint32(BITS_PER_VALUE * (width(factors) + extra_values))


def index_bits(kept: Array, max_rank: int) -> Array:
    """Bits that say which `kept` (uint32) of a matrix's R ranks follow: a list, or a bitmap if that is shorter."""
    position_bits = (max_rank - 1).bit_length()
    return jnp.minimum(jnp.uint32(max_rank), kept * jnp.uint32(position_bits))


def head_bits(like: Adapters) -> int:
    """Bits of the task head, sent whole."""
    return BITS_PER_VALUE * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like.head))


def dense_bits(like: Adapters, rank_mask: Array) -> Array:
    """uint32 bits of all ranks in use and the head: a dense upload, or the broadcast."""
    rank = jnp.sum(rank_mask).astype(jnp.uint32)
    parts = [component_bits(rank * f.a.shape[0], f) for f in like.modules.values()]
    return sum(parts, jnp.uint32(head_bits(like)))


def check_fits(like: Adapters, extra_values: int = 0) -> None:
    """Raise ValueError where a count of bits could overflow uint32.

    Args:
      like: adapters, or their shapes.
      extra_values: sent with every component beside its factors.
    """
    bits = head_bits(like)
    for factors in like.modules.values():
        layers, _, max_rank = factors.a.shape
        index = max_rank  # never more than the bitmap
        bits += layers * (max_rank * BITS_PER_VALUE * (width(factors) + extra_values) + index)
    if bits >= 2**32:
        raise ValueError(f"payload of one client must be below 2**32 bits, got {bits}")
