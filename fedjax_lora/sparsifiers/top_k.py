"""The values of the factors that changed the most, wherever they stand: sparsification without structure.

Top-k of magnitudes as in A. F. Aji and K. Heafield, "Sparse Communication for Distributed Gradient Descent",
EMNLP 2017, over all that a client sends of its factors as one pool. An element costs its value and its position,
which is most of what choosing by rank component saves.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import diagnostics, payload, ranks
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, arriving


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(Options):
    """Send the `keep_ratio` of the factors' values that changed the most; there is no regulariser to weigh."""

    orthogonality: ClassVar[float] = 0.0
    name: Literal["top_k"] = "top_k"


def make(config: TopKConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of single values: what was not sent is unchanged.

    Kept ranks are reported as the share of the pool times r. Tail energy: what is left out of
    `||da||_F^2 + ||db||_F^2`, in units of a factor squared.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the changes of the numbers travel.
    """
    del config  # it has no option yet, but every method is made in the same way
    payload.check_fits(like, bits_per_value=FLOAT32.bits_per_value + 1)  # a bit of the bitmap with each value
    max_rank = ranks.max_rank(like)

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        trained = scope.select(trained, start)
        kept, in_use = num_kept(keep_ratio, pool_size(like, scope)), ranks.everywhere(scope.ranks, like)
        sparse = dataclasses.replace(trained, modules=sparsified(trained.modules, start.modules, kept))
        sent = Sent(
            adapters=scope.select(arriving(wire, sparse, start, key), start),
            counted=in_use,
            bits=bits(kept, like, scope, wire),
            kept_ranks=jnp.sum(scope.ranks) * kept / jnp.maximum(pool_size(like, scope), 1),
            dropped_energy=diagnostics.difference_energy(trained, sparse, in_use),
        )
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        change = jax.tree.map(jnp.subtract, scope.select(trained, start), start)
        tails = ranks.tails(jnp.sort(ravel_pytree(change.modules)[0] ** 2, descending=True))
        rank = jnp.sum(scope.ranks).astype(jnp.uint32)
        kept = jnp.minimum(jnp.arange(max_rank + 1, dtype=jnp.uint32), rank)
        return tails[kept * (pool_size(like, scope) // rank)]

    def payload_bits(keep_ratio: Array, scope: Scope) -> Array:
        return bits(num_kept(keep_ratio, pool_size(like, scope)), like, scope, wire).astype(jnp.float32)

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=payload_bits,
        compress=compress,
    )


def pool_size(like: Adapters, scope: Scope) -> Array:
    """uint32 values of the factors that are in scope."""
    of_a = sum(f.a.shape[0] * f.a.shape[1] for f in like.modules.values())
    of_b = sum(f.b.shape[0] * f.b.shape[2] for f in like.modules.values())
    a, b, rank = (part.astype(jnp.uint32) for part in (scope.a, scope.b, jnp.sum(scope.ranks)))
    return rank * (a * jnp.uint32(of_a) + b * jnp.uint32(of_b))


def num_kept(keep_ratio: Array | float, pool: Array) -> Array:
    """`[...]` uint32 values to send of `pool` (uint32): at least 1, unless there is none."""
    # Counted from the top, so that a ratio of 1 is all of a pool that float32 cannot hold.
    left_out = jnp.ceil((1.0 - keep_ratio) * pool.astype(jnp.float32)).astype(jnp.uint32)
    return jnp.maximum(pool - jnp.minimum(left_out, pool), jnp.minimum(pool, 1))


def sparsified(values: Any, known: Any, count: Array) -> Any:
    """`known` with `count` of its entries, those furthest from `values`, replaced by them; trees of one structure."""
    flat, rebuild = ravel_pytree(values)
    others, _ = ravel_pytree(known)
    return rebuild(jnp.where(largest(jnp.abs(flat - others), count), flat, others))


def largest(magnitudes: Array, count: Array) -> Array:
    """True at the `count` (uint32) largest of non-negative `magnitudes` `[n]`; the first of equals wins.

    The count-th largest is found bit by bit, since non-negative floats are ordered as their bits are: 31 passes over
    the values, where a sort of millions for every client would be the dearest step of the round.
    """
    order = lax.bitcast_convert_type(magnitudes.astype(jnp.float32), jnp.uint32)

    def try_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= higher, dtype=jnp.uint32) >= count, higher, threshold)

    threshold = lax.fori_loop(0, 31, try_bit, jnp.uint32(0))
    above, equal = order > threshold, order == threshold
    room = count - jnp.sum(above, dtype=jnp.uint32)
    return above | (equal & (jnp.cumsum(equal, dtype=jnp.uint32) <= room))


def bits(count: Array, like: Adapters, scope: Scope, wire: Wire) -> Array:
    """uint32 bits of `count` (uint32) values of the pool, with their positions, and of the head."""
    pool = pool_size(like, scope)
    position_bits = 32 - lax.clz(jnp.maximum(pool, 1) - 1)  # ceil(log2(pool))
    index = jnp.minimum(pool, count * position_bits)  # a bitmap, if that is shorter
    return payload.common_bits(like, scope, wire) + count * jnp.uint32(wire.bits_per_value) + index
