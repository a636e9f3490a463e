"""Which rank components a client keeps, as masks of static shape."""

import math

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.base import Adapters, Factors

FLOOR_SLACK = 1e-4
"""Added before rounding down, so that a ratio k / r rounded to float32 keeps k components and not k - 1."""


def max_rank(like: Adapters) -> int:
    """R, which all modules share."""
    found = {rank for f in like.modules.values() for rank in (f.a.shape[-1], f.b.shape[-2])}
    if len(found) != 1:
        raise ValueError(f"modules must have one common maximum rank, got {sorted(found)}")
    return found.pop()


def num_matrices(like: Adapters) -> int:
    """Matrices that carry an adapter: layers, summed over modules."""
    return sum(factors.a.shape[0] for factors in like.modules.values())


def num_kept(keep_ratio: Array, rank_mask: Array) -> Array:
    """`[...]` uint32 components kept a matrix, k = max(1, floor(keep_ratio * r)), for ratios `[...]`."""
    rank = jnp.sum(rank_mask)
    return jnp.clip(jnp.floor(keep_ratio * rank + FLOOR_SLACK), 1, rank).astype(jnp.uint32)


def everywhere(rank_mask: Array, like: Adapters) -> dict[str, Array]:
    """The `[R]` mask for every matrix: module name -> `[L, R]`."""
    return {
        name: jnp.broadcast_to(rank_mask, (factors.a.shape[0], rank_mask.shape[-1]))
        for name, factors in like.modules.items()
    }


def largest(scores: Array, count: Array) -> Array:
    """1.0 at the `count` largest of the last axis `[..., n]`, else 0.0; the first of equals wins."""
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    position = jnp.argsort(order, axis=-1)
    return (position < count.astype(position.dtype)).astype(jnp.float32)


def largest_overall(scores: dict[str, Array], count: Array) -> dict[str, Array]:
    """`largest` over all modules together, by name; each module's mask has the shape of its scores."""
    # Sorted as jax sorts a dict that enters a traced function: equals are then broken alike outside of it.
    scores = dict(sorted(scores.items()))
    flat = largest(jnp.concatenate([s.ravel() for s in scores.values()]), count)
    masks, offset = {}, 0
    for name, s in scores.items():
        size = math.prod(s.shape)
        masks[name] = flat[offset : offset + size].reshape(s.shape)
        offset += size
    return masks


def replace(fill: Adapters, trained: Adapters, chosen: dict[str, Array]) -> Adapters:
    """`trained` in the `chosen` components and in the head, `fill` in the others."""
    modules = {}
    for name, new in trained.modules.items():
        old, take = fill.modules[name], chosen[name] > 0
        modules[name] = Factors(
            a=jnp.where(take[..., None, :], new.a, old.a), b=jnp.where(take[..., :, None], new.b, old.b)
        )
    return Adapters(modules=modules, head=trained.head)


def tails(energies: Array) -> Array:
    """`[R + 1]` sums of what lies beyond the first k of the non-negative `energies` `[R]`, k = 0 ... R."""
    sums = lax.cumsum(energies, reverse=True)
    # Partial sums are rounded each in its own order: the maximum restores the order they have on paper.
    return jnp.append(lax.cummax(sums, reverse=True), 0.0)
