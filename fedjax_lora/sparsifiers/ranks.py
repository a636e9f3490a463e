"""Which rank components a client keeps, as masks of static shape, and what sending them costs."""

import math
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.methods import Sent
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers import diagnostics, payload
from fedjax_lora.sparsifiers.wire import Wire, arriving

Budget = Literal["module", "global"]
"""Whether k components of each matrix are kept, or as many in all, chosen over the whole adapter."""

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


def choose(scores: dict[str, Array], kept: Array, budget: Budget, rank_mask: Array) -> dict[str, Array]:
    """Masks `[L, R]` of the components with the largest scores, by module; none of a rank that is not in use."""
    if budget == "global":
        matrices = sum(s.shape[0] for s in scores.values())
        chosen = largest_overall(scores, kept * matrices)
    else:
        chosen = {name: largest(s, kept) for name, s in scores.items()}
    return {name: mask * rank_mask for name, mask in chosen.items()}


def chosen_bits(chosen: dict[str, Array], budget: Budget, like: Adapters, scope: Scope, wire: Wire) -> Array:
    """uint32 bits of the chosen components, module name -> `[L, R]`, with index and head."""
    bits = payload.common_bits(like, scope, wire)
    for name, mask in chosen.items():
        kept = jnp.sum(mask, axis=-1).astype(jnp.uint32)
        bits += payload.component_bits(jnp.sum(kept), like.modules[name], scope, wire)
        bits += jnp.sum(_index_bits(kept, budget, mask.shape[-1]))
    return bits


def _index_bits(kept: Array, budget: Budget, max_rank: int) -> Array:
    """uint32 bits of a matrix's index: a bitmap where the receiver does not know how many components come."""
    return payload.index_bits(kept, max_rank) if budget == "module" else jnp.full_like(kept, max_rank)


def planned_bits(keep_ratio: Array, budget: Budget, like: Adapters, scope: Scope, wire: Wire) -> Array:
    """`[...]` float32: the most that `chosen_bits` can be at keep ratios `[...]`."""
    kept = num_kept(keep_ratio, scope.ranks)
    rank = jnp.sum(scope.ranks).astype(jnp.uint32)
    index = num_matrices(like) * _index_bits(kept, budget, max_rank(like))
    bits, left = payload.common_bits(like, scope, wire) + index, kept * num_matrices(like)
    for factors in sorted(like.modules.values(), key=payload.width, reverse=True):
        layers = factors.a.shape[0]
        count = jnp.minimum(left, rank * layers) if budget == "global" else kept * layers
        bits, left = bits + payload.component_bits(count, factors, scope, wire), left - count
    return bits.astype(jnp.float32)


def tail_energy(energies: Array, budget: Budget) -> Array:
    """`[R + 1]` energy left out when k components a matrix are kept, from those of all, `[matrices, R]`."""
    if budget == "global":
        # Keeping k a matrix keeps the first k * matrices of all: one column of these.
        ordered = jnp.sort(energies.ravel(), descending=True).reshape(energies.shape[::-1]).T
    else:
        ordered = jnp.sort(energies, axis=-1, descending=True)
    return tails(jnp.sum(ordered, axis=0))


def replace(fill: Adapters, trained: Adapters, chosen: dict[str, Array]) -> Adapters:
    """`trained` in the `chosen` components and in the head, `fill` in the others."""
    modules = {}
    for name, new in trained.modules.items():
        old, take = fill.modules[name], chosen[name] > 0
        modules[name] = Factors(
            a=jnp.where(take[..., None, :], new.a, old.a), b=jnp.where(take[..., :, None], new.b, old.b)
        )
    return Adapters(modules=modules, head=trained.head)


def send_changes(
    start: Adapters, trained: Adapters, chosen: dict[str, Array], bits: Array, scope: Scope, wire: Wire, key: Array
) -> Sent:
    """The changes of the `chosen` components, module name -> `[L, R]`, at `bits`; a component not sent is unchanged."""
    in_use = everywhere(scope.ranks, start)
    drop = {name: in_use[name] - mask for name, mask in chosen.items()}
    return Sent(
        adapters=scope.select(arriving(wire, replace(start, trained, chosen), start, key), start),
        counted=in_use,
        bits=bits,
        kept_ranks=sum((jnp.sum(mask) for mask in chosen.values()), jnp.zeros(())) / num_matrices(start),
        dropped_energy=diagnostics.difference_energy(trained, start, drop),
    )


def tails(energies: Array) -> Array:
    """`[R + 1]` sums of what lies beyond the first k of the non-negative `energies` `[R]`, k = 0 ... R."""
    sums = lax.cumsum(energies, reverse=True)
    # Partial sums are rounded each in its own order: the maximum restores the order they have on paper.
    return jnp.append(lax.cummax(sums, reverse=True), 0.0)
