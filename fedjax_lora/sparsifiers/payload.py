"""What a message costs: exact counts of values, and the one place where they become bits.

A module has L matrices of each factor, and a component of one layer costs `n_in` values for a and `n_out` for b.
Widths differ between modules (grouped-query attention), hence a count for every module. The head is sent whole.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.count import Count, total
from fedjax_lora.core.exchange import Message, Size, Transform
from fedjax_lora.core.types import Adapters, Factors, Scope

FLOAT_BITS = 32
"""Bits of a number that no transform has shortened."""


def bits(size: Size, transforms: Sequence[Transform] = ()) -> Count:
    """Bits of a message of this size after these transforms, or of messages `[...]`."""
    value_bits = [t.bits_per_value for t in transforms if t.bits_per_value is not None]
    scale_bits = sum(t.bits_per_tensor for t in transforms)
    values = size.values * (value_bits[-1] if value_bits else FLOAT_BITS)
    with_scales = values + size.tensors * scale_bits if scale_bits else values
    return with_scales + size.exact * FLOAT_BITS + size.index_bits


def message_size(message: Message) -> Size:
    """What a message consists of, counted from its masks.

    A tensor `[..., n, m]` is as many matrices as its leading axes say; one is counted where any of it is sent.
    """
    values, tensors = _counted(message.tensors, message.sent)
    exact, _ = _counted(message.exact, message.exact_sent)
    return Size(values=values, tensors=tensors, exact=exact, index_bits=message.index_bits)


def _counted(tensors: Any, sent: Any) -> tuple[Count, Count]:
    """Values that are sent, and matrices (or vectors, scalars) that these are of."""
    values, matrices = [], []
    for tensor, mask in zip(jax.tree.leaves(tensors), jax.tree.leaves(sent), strict=True):
        shape, lead = tensor.shape, max(len(tensor.shape) - 2, 0)
        if not tensor.size:  # of a model of which no layer is at the client
            continue
        of_each = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape) != 0
        any_sent = jnp.any(of_each, axis=tuple(range(lead, len(shape))))
        for found, entries, whole in ((values, of_each, shape), (matrices, any_sent, shape[:lead])):
            stands_for = math.prod(whole) // math.prod(entries.shape)
            found.append(Count.of(stands_for) * jnp.sum(entries, dtype=jnp.uint32))
    return total(values), total(matrices)


def component_size(
    like: Adapters,
    counts: Mapping[str, tuple[Array, Array]],
    scope: Scope,
    exact_each: ArrayLike = 0,
    index_bits: Count | None = None,
) -> Size:
    """The size of the head and so many components of each module, of what is in scope.

    Args:
      like: adapters, or their shapes.
      counts: module name -> components of a and of b over all layers, uint32, `[...]`; none of its matrices is empty.
      scope: what is sent.
      exact_each: values in float32 with each factor's part of a component, uint32.
      index_bits: of saying which components these are; None for none.
    """
    values, tensors = _head_and_tensors(like, scope)
    exact = Count.of(0)
    for name, (of_a, of_b) in counts.items():
        n_in, n_out = like.modules[name].a.shape[-2], like.modules[name].b.shape[-1]
        sent_a, sent_b = Count.of(of_a * _whole(scope.a)), Count.of(of_b * _whole(scope.b))
        values = values + sent_a * n_in + sent_b * n_out
        exact = exact + (sent_a + sent_b) * exact_each
    return Size(values=values, tensors=tensors, exact=exact, index_bits=index_bits or Count.of(0))


def value_size(like: Adapters, count: Array, scope: Scope, index_bits: Count) -> Size:
    """The size of the head and `count` (uint32) single values of the factors in scope, some of every matrix."""
    values, tensors = _head_and_tensors(like, scope)
    return Size(values=values + Count.of(count), tensors=tensors, exact=Count.of(0), index_bits=index_bits)


def _head_and_tensors(like: Adapters, scope: Scope) -> tuple[Count, Count]:
    """Values of the head, and the tensors of all that is in scope."""
    matrices = sum(factors.a.shape[0] for factors in like.modules.values())
    leaves = jax.tree.leaves(like.head)
    values = Count.of(_whole(scope.head)) * sum(math.prod(leaf.shape) for leaf in leaves)
    tensors = matrices * (_whole(scope.a) + _whole(scope.b)) + len(leaves) * _whole(scope.head)
    return values, Count.of(tensors)


def _whole(part: Array) -> Array:
    """1 or 0 of a scope as an integer to count with."""
    return jnp.asarray(part).astype(jnp.uint32)


def dense_size(like: Adapters, scope: Scope) -> Size:
    """The size of all that is in scope: a dense upload, or the broadcast."""
    return component_size(like, {name: (count, count) for name, count in num_components(like, scope).items()}, scope)


def num_components(like: Adapters, scope: Scope) -> dict[str, Array]:
    """Module name -> components in use over all its layers, uint32."""

    def of_module(name: str, layers: int) -> Array:
        ranks = scope.of_module(name)
        rank = jnp.sum(ranks).astype(jnp.uint32)
        return rank * layers if ranks.ndim == 1 else rank

    return {name: of_module(name, f.a.shape[0]) for name, f in like.modules.items()}


def dense_broadcast(adapters: Adapters, scope: Scope, ranks: Array) -> tuple[Adapters, Size]:
    """`Sparsifier.broadcast` of a server that sends a client all that is in scope of its ranks."""
    return adapters, dense_size(adapters, dataclasses.replace(scope, ranks=ranks))


def index_bits(kept: Array, max_rank: int) -> Array:
    """Bits that say which `kept` (uint32) of a matrix's R ranks follow: a list, or a bitmap if that is shorter.

    The receiver knows how many there are, since each matrix has as many.
    """
    position_bits = (max_rank - 1).bit_length()
    return jnp.minimum(jnp.uint32(max_rank), kept * jnp.uint32(position_bits))


def width(factors: Factors) -> int:
    """Values in one component of one layer, `n_in + n_out`."""
    return factors.a.shape[-2] + factors.b.shape[-1]


def sent_head(like: Adapters, scope: Scope) -> dict[str, Array]:
    """Masks of the head's leaves, scalar bools."""
    return dict.fromkeys(like.head, scope.head > 0)


def pack(known: Adapters, held: Adapters, sent: Adapters) -> Adapters:
    """Changes from what the receiver knows to what a client holds; zero where the masks `sent` are."""
    return jax.tree.map(lambda x, x0, mask: jnp.where(mask, x - x0, 0.0), held, known, sent)


def unpack(known: Adapters, message: Message, fill: Adapters) -> Adapters:
    """What a client holds, of a message that `pack` made of its tensors; `fill` where nothing was sent."""
    return jax.tree.map(
        lambda x0, change, mask, other: jnp.where(mask, x0 + change, other),
        known,
        message.tensors,
        message.sent,
        fill,
    )
