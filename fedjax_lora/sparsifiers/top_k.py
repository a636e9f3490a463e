"""The values of the factors that changed the most, wherever they stand: sparsification without structure.

Top-k of magnitudes as in A. F. Aji and K. Heafield, "Sparse Communication for Distributed Gradient Descent",
EMNLP 2017, over all that a client sends of its factors as one pool. An element costs its value and its position,
which is most of what choosing by rank component saves.
"""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers import diagnostics, payload, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(Options):
    """Send as large a share of the factors' values as of their ranks is to be kept: those that changed the most."""

    name: Literal["top_k"] = "top_k"


def make(options: TopKConfig, context: Context) -> Sparsifier:
    """The sparsifier of single values: what was not sent is unchanged.

    Kept ranks are reported as the share of the pool times r. Tail energy: what is left out of
    `||da||_F^2 + ||db||_F^2`, in units of a factor squared.
    """
    del options  # it has no option yet, but every method is made in the same way
    like = ranks.shapes(context)
    max_rank = ranks.max_rank(like)
    if max_rank * sum(_values_of_a_rank(like)) >= 2**32:
        raise ValueError(f"factors must hold fewer than 2**32 values, got {max_rank * sum(_values_of_a_rank(like))}")

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        pool, rank = pool_size(like, scope), jnp.sum(scope.ranks).astype(jnp.uint32)
        change = jax.tree.map(jnp.subtract, scope.select(trained, start), start)
        tails = ranks.tails(jnp.sort(_flat(change.modules) ** 2, descending=True))
        whole = jnp.minimum(jnp.arange(max_rank + 1, dtype=jnp.uint32), rank)
        count = num_kept(ranks.each(scope.ranks).astype(jnp.float32), pool, jnp.sum(scope.ranks))
        size = payload.value_size(like, count, scope, index_bits(count, pool))
        return ranks.offer(tails[whole * (pool // rank)], size)

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        trained, pool, rank = scope.select(trained, start), pool_size(like, scope), jnp.sum(scope.ranks)
        count = num_kept(kept, pool, rank)
        masks = chosen(trained.modules, start.modules, count, scope)
        sent = Adapters(modules=masks, head=payload.sent_head(like, scope))
        sparse = Adapters(jax.tree.map(jnp.where, masks, trained.modules, start.modules), trained.head)
        in_use = ranks.everywhere(scope.ranks, like)
        return Message(
            tensors=payload.pack(start, trained, sent),
            sent=sent,
            index_bits=index_bits(count, pool),
            kept_ranks=rank * count / jnp.maximum(pool, 1),
            dropped_energy=diagnostics.difference_energy(trained, sparse, in_use),
        )

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        return ranks.decode(start, message, scope, "zero")

    return Sparsifier(offer=offer, encode=encode, decode=decode, whole_ranks=False)


METHOD = Method(
    "sparsifier",
    "top_k",
    TopKConfig,
    make,
    needs=frozenset({"even_ranks"}),
    breaks=frozenset({"everything_sent"}),
)


def pool_size(like: Adapters, scope: Scope) -> Array:
    """uint32 values of the factors that are in scope."""
    of_a, of_b = _values_of_a_rank(like)
    a, b, rank = (part.astype(jnp.uint32) for part in (scope.a, scope.b, jnp.sum(scope.ranks)))
    return rank * (a * jnp.uint32(of_a) + b * jnp.uint32(of_b))


def _values_of_a_rank(like: Adapters) -> tuple[int, int]:
    """Values of one component of every matrix, of a and of b."""
    of_a = sum(f.a.shape[0] * f.a.shape[1] for f in like.modules.values())
    of_b = sum(f.b.shape[0] * f.b.shape[2] for f in like.modules.values())
    return of_a, of_b


def num_kept(part: Array | float, pool: Array, whole: Array | float = 1.0) -> Array:
    """`[...]` uint32 values to send of `pool` (uint32) for `part` of `whole`: at least 1, unless there is none.

    Args:
      part: float32 `[...]`, at most `whole`.
      pool: values in all, a multiple of `whole`, so that whole parts are counted exactly.
      whole: float32, a whole number.
    """
    # Counted from the top and by whole parts, so that these are exact in a pool that float32 cannot hold.
    each, missing = pool // jnp.asarray(whole).astype(jnp.uint32), jnp.maximum(whole - part, 0.0)
    parts = jnp.floor(missing)
    fraction = jnp.ceil((missing - parts) * each.astype(jnp.float32))
    left_out = parts.astype(jnp.uint32) * each + fraction.astype(jnp.uint32)
    return jnp.maximum(pool - jnp.minimum(left_out, pool), jnp.minimum(pool, 1))


def chosen(values: dict[str, Factors], known: dict[str, Factors], count: Array, scope: Scope) -> dict[str, Factors]:
    """Masks, bool, of the `count` entries in scope that are furthest from `known`, by module."""
    leaves, structure = jax.tree.flatten(values)
    of_a, of_b = scope.ranks * scope.a > 0, (scope.ranks * scope.b > 0)[:, None]
    among = {
        name: Factors(a=jnp.broadcast_to(of_a, f.a.shape), b=jnp.broadcast_to(of_b, f.b.shape))
        for name, f in values.items()
    }
    flat = largest(jnp.abs(_flat(values) - _flat(known)), count, _flat(among))
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))[:-1]
    parts = zip(jnp.split(flat, ends), leaves, strict=True)
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in parts])


def _flat(tree: Any) -> Array:
    """All entries of a tree in one vector."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def largest(magnitudes: Array, count: Array, among: Array | bool = True) -> Array:
    """True at the `count` (uint32) largest of non-negative `magnitudes` `[n]`; the first of equals wins.

    Those that are not `among` (bool, `[n]`) come after all others.

    The count-th largest is found bit by bit, since non-negative floats are ordered as their bits are: 31 passes over
    the values, where a sort of millions for every client would be the dearest step of the round.
    """
    order = jnp.where(among, lax.bitcast_convert_type(magnitudes.astype(jnp.float32), jnp.uint32) + 1, 0)

    def try_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= higher, dtype=jnp.uint32) >= count, higher, threshold)

    threshold = lax.fori_loop(0, 31, try_bit, jnp.uint32(0))
    above, equal = order > threshold, order == threshold
    room = count - jnp.sum(above, dtype=jnp.uint32)
    return above | (equal & (jnp.cumsum(equal, dtype=jnp.uint32) <= room))


def index_bits(count: Array, pool: Array) -> Count:
    """Bits that say which `count` `[...]` of `pool` values (uint32) follow: a list, or a bitmap if that is shorter."""
    position_bits = 32 - lax.clz(jnp.maximum(pool, 1) - 1)  # ceil(log2(pool))
    return Count.of(pool).minimum(Count.of(count) * position_bits)
