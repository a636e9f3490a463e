"""Which rank components a client keeps, as masks of static shape, and messages of whole components."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Offer, Received, Size
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.ops.places import descending_places
from fedjax_lora.sparsifiers import diagnostics, payload

Budget = Literal["module", "global"]
"""Whether k components of each matrix are kept, or as many in all, chosen over the whole adapter."""

Missing = Literal["senders", "zero"]
"""How a component that was not sent enters the average, see `soft.SoftConfig`."""

FLOOR_SLACK = 1e-4
"""Added before rounding down, so that ranks that were rounded to float32 on their way keep k components, not k - 1."""


def shapes(context: Context) -> Adapters:
    """The adapters' shapes, which all modules have R of in common."""
    if context.like is None:
        raise ValueError("a sparsifier must be made for adapters, got a context with like None")
    max_rank(context.like)
    return context.like


def max_rank(like: Adapters) -> int:
    """R, which all modules share."""
    found = {rank for f in like.modules.values() for rank in (f.a.shape[-1], f.b.shape[-2])}
    if len(found) != 1:
        raise ValueError(f"modules must have one common maximum rank, got {sorted(found)}")
    return found.pop()


def num_matrices(like: Adapters) -> int:
    """Matrices that carry an adapter: layers, summed over modules."""
    return sum(factors.a.shape[0] for factors in like.modules.values())


def whole(kept: Array, rank_mask: Array) -> Array:
    """`[...]` uint32 components kept a matrix, max(1, floor(kept)) and at most r, for `kept` ranks `[...]`, float32."""
    return jnp.clip(jnp.floor(kept + FLOOR_SLACK), 1, jnp.sum(rank_mask)).astype(jnp.uint32)


def each(rank_mask: Array) -> Array:
    """`[R + 1]` uint32 components kept where k = 0 ... R are asked for."""
    return whole(jnp.arange(rank_mask.shape[-1] + 1, dtype=jnp.float32), rank_mask)


def everywhere(rank_mask: Array, like: Adapters) -> dict[str, Array]:
    """The `[R]` mask for every matrix: module name -> `[L, R]`."""
    return in_use(Scope.whole(rank_mask), like)


def in_use(scope: Scope, like: Adapters) -> dict[str, Array]:
    """The components in use of every matrix: module name -> `[L, R]`."""
    return {
        name: jnp.broadcast_to(scope.of_module(name), (factors.a.shape[0], scope.ranks.shape[-1]))
        for name, factors in like.modules.items()
    }


def kept_in_layers(kept: Array, like: Adapters, scope: Scope) -> dict[str, Array]:
    """Module name -> `[..., L]` uint32: `kept` `[...]` components, or as many as a layer has."""
    return {
        name: jnp.minimum(kept[..., None], jnp.sum(mask, axis=-1).astype(jnp.uint32))
        for name, mask in in_use(scope, like).items()
    }


def largest(scores: Array, count: Array) -> Array:
    """1.0 at the `count` largest of the last axis `[..., n]`, else 0.0; the first of equals wins."""
    place = descending_places(scores)
    return (place < count.astype(place.dtype)).astype(jnp.float32)


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


def choose(scores: dict[str, Array], kept: Array, budget: Budget, scope: Scope) -> dict[str, Array]:
    """Masks `[L, R]` of the components with the largest scores, by module; none of a rank that is not in use."""
    if budget == "global":
        matrices = sum(s.shape[0] for s in scores.values())
        chosen = largest_overall(scores, kept * matrices)
    else:
        chosen = {name: largest(s, kept) for name, s in scores.items()}
    return {name: mask * scope.of_module(name) for name, mask in chosen.items()}


def index_bits(kept: Array, budget: Budget, max_rank: int) -> Array:
    """uint32 bits of a matrix's index: a bitmap where the receiver does not know how many components come."""
    return payload.index_bits(kept, max_rank) if budget == "module" else jnp.full_like(kept, max_rank)


def chosen_index_bits(chosen: dict[str, Array], budget: Budget) -> Count:
    """Bits of saying which components are chosen, module name -> `[L, R]`."""
    found = jnp.uint32(0)
    for mask in chosen.values():
        kept = jnp.sum(mask, axis=-1).astype(jnp.uint32)
        found += jnp.sum(index_bits(kept, budget, mask.shape[-1]))
    return Count.of(found)


def planned_size(kept: Array, budget: Budget, like: Adapters, scope: Scope) -> Size:
    """The most that a message of `kept` `[...]` (uint32) components a matrix can be, with its index.

    With the global budget that is where the widest modules take all that they can.
    """
    left, counts, index = kept * num_matrices(like), {}, jnp.zeros_like(kept)
    of_layers, most = kept_in_layers(kept, like, scope), payload.num_components(like, scope)
    for name in sorted(like.modules, key=lambda name: payload.width(like.modules[name]), reverse=True):
        count = jnp.minimum(left, most[name]) if budget == "global" else jnp.sum(of_layers[name], axis=-1)
        counts[name], left = (count, count), left - count
        index += jnp.sum(index_bits(of_layers[name], budget, max_rank(like)), axis=-1)
    return payload.component_size(like, counts, scope, index_bits=Count.of(index))


def tail_energy(energies: Array, budget: Budget) -> Array:
    """`[R + 1]` energy left out when k components a matrix are kept, from those of all, `[matrices, R]`."""
    if budget == "global":
        # Keeping k a matrix keeps the first k * matrices of all: one column of these.
        ordered = jnp.sort(energies.ravel(), descending=True).reshape(energies.shape[::-1]).T
    else:
        ordered = jnp.sort(energies, axis=-1, descending=True)
    return tails(jnp.sum(ordered, axis=0))


def offer(tail_energy: Array, size: Size) -> Offer:
    """The offer of this tail energy, `[R + 1]`, and size, of `[R + 1]` or of one for all."""
    return Offer(tail_energy, jax.tree.map(lambda count: jnp.broadcast_to(count, tail_energy.shape), size))


def sent_masks(like: Adapters, of_a: dict[str, Array], of_b: dict[str, Array], scope: Scope) -> Adapters:
    """Masks of what is sent of these components, module name -> `[L, R]`, of either factor, and of the head.

    A factor that is out of scope is not sent. Leaves are `[L, 1, R]`, `[L, R, 1]` and, for the head, scalars; bool.
    """
    modules = {
        name: Factors(a=(of_a[name] * scope.a > 0)[:, None, :], b=(of_b[name] * scope.b > 0)[:, :, None])
        for name in like.modules
    }
    return Adapters(modules=modules, head=payload.sent_head(like, scope))


def encode(known: Adapters, held: Adapters, chosen: dict[str, Array], scope: Scope, index_bits: Count) -> Message:
    """A message of the `chosen` components, module name -> `[L, R]`, and of the head.

    Args:
      known: what the receiver adds the message to.
      held: by the client.
      chosen: masks, 0 in ranks that are not in use.
      scope: what is sent.
      index_bits: of saying which are chosen.
    """
    sent = sent_masks(held, chosen, chosen, scope)
    drop = {name: scope.of_module(name) - mask for name, mask in chosen.items()}
    return Message(
        tensors=payload.pack(known, held, sent),
        sent=sent,
        index_bits=index_bits,
        kept_ranks=sum((jnp.sum(mask) for mask in chosen.values()), jnp.zeros(())) / max(num_matrices(held), 1),
        dropped_energy=diagnostics.difference_energy(held, known, drop),
    )


def decode(
    start: Adapters,
    message: Message,
    scope: Scope,
    missing: Missing,
    known: Adapters | None = None,
    fill: Adapters | None = None,
) -> Received:
    """What `encode` has sent, as the server holds it.

    Args:
      start: the broadcast.
      message: as it arrives.
      scope: what is sent.
      missing: whether a client has a say in the components that it did not send.
      known: what the changes are added to; None for the broadcast.
      fill: what stands where nothing was sent; None for the broadcast.
    """
    known, fill = start if known is None else known, start if fill is None else fill
    return Received(
        adapters=payload.unpack(known, message, fill),
        counted=sent_components(message) if missing == "senders" else in_use(scope, start),
    )


def sent_components(message: Message) -> dict[str, Array]:
    """Module name -> `[L, R]`, 1 where either factor's part of the component was sent."""
    return {
        name: (factors.a[:, 0, :] | factors.b[:, :, 0]).astype(jnp.float32)
        for name, factors in message.sent.modules.items()
    }


def tails(energies: Array) -> Array:
    """`[R + 1]` sums of what lies beyond the first k of the non-negative `energies` `[R]`, k = 0 ... R."""
    sums = lax.cumsum(energies, reverse=True)
    # Partial sums are rounded each in its own order: the maximum restores the order they have on paper.
    return jnp.append(lax.cummax(sums, reverse=True), 0.0)
