"""What components and the head cost: exact counts of bits, in uint32.

A module has L matrices of each factor, and a component of one layer costs `n_in` values for a and `n_out` for b.
Widths differ between modules (grouped-query attention), hence a count for every module. Heads are charged in full.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire


def width(factors: Factors) -> int:
    """Values in one component of one layer, `n_in + n_out`."""
    return factors.a.shape[-2] + factors.b.shape[-1]


def component_bits(
    count: Array, factors: Factors, scope: Scope, wire: Wire = FLOAT32, exact_values: Array | int = 0
) -> Array:
    """Bits of `count` (uint32) components of a module: of the factors that are in scope.

    exact_values: sent in float32 with each factor's part of a component, whatever the wire; uint32.
    """
    exact_bits = jnp.uint32(FLOAT32.bits_per_value) * jnp.asarray(exact_values, jnp.uint32)
    of_a, of_b = (
        jnp.uint32(width * wire.bits_per_value) + exact_bits for width in (factors.a.shape[-2], factors.b.shape[-1])
    )
    return count * (of_a * scope.a.astype(jnp.uint32) + of_b * scope.b.astype(jnp.uint32))


def index_bits(kept: Array, max_rank: int) -> Array:
    """Bits that say which `kept` (uint32) of a matrix's R ranks follow: a list, or a bitmap if that is shorter.

    The receiver knows how many there are, since each matrix has as many.
    """
    position_bits = (max_rank - 1).bit_length()
    return jnp.minimum(jnp.uint32(max_rank), kept * jnp.uint32(position_bits))


def head_values(like: Adapters) -> int:
    """Values of the task head, which is sent whole."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like.head))


def common_bits(like: Adapters, scope: Scope, wire: Wire = FLOAT32) -> Array:
    """uint32 bits that every payload has: the head, and the scale of each tensor where the wire has scales."""
    matrices = sum(factors.a.shape[0] for factors in like.modules.values())
    a, b, head = (part.astype(jnp.uint32) for part in (scope.a, scope.b, scope.head))
    scales = matrices * (a + b) + len(jax.tree.leaves(like.head)) * head
    return head * jnp.uint32(head_values(like) * wire.bits_per_value) + scales * jnp.uint32(wire.bits_per_tensor)


def dense_bits(like: Adapters, scope: Scope, wire: Wire = FLOAT32) -> Array:
    """uint32 bits of all that is in scope: a dense upload, or the broadcast."""
    rank = jnp.sum(scope.ranks).astype(jnp.uint32)
    parts = [component_bits(rank * f.a.shape[0], f, scope, wire) for f in like.modules.values()]
    return sum(parts, common_bits(like, scope, wire))


def dense_broadcast(adapters: Adapters, scope: Scope, ranks: Array) -> tuple[Adapters, Array]:
    """`Sparsifier.broadcast` of a server that sends a client all that is in scope of its ranks."""
    return adapters, dense_bits(adapters, dataclasses.replace(scope, ranks=ranks))


def check_fits(like: Adapters, extra_values: int = 0, bits_per_value: int = FLOAT32.bits_per_value) -> None:
    """Raise ValueError where a count of bits could overflow uint32.

    Args:
      like: adapters, or their shapes.
      extra_values: sent with every component beside its factors.
      bits_per_value: the most that a value costs.
    """
    bits = bits_per_value * head_values(like)
    for factors in like.modules.values():
        layers, _, max_rank = factors.a.shape
        index = max_rank  # never more than the bitmap
        bits += layers * (max_rank * bits_per_value * (width(factors) + extra_values) + index)
    if bits >= 2**32:
        raise ValueError(f"payload of one client must be below 2**32 bits, got {bits}")
