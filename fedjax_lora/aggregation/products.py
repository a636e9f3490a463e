"""What the methods that look at the clients' products have in common: each is a function of one layer of one module.

A client's product is that of its adapters as the server decodes them, ranks that it did not send included: there the
server's copy holds the broadcast. Clients weigh p_k in it, whatever they count in.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import errors
from fedjax_lora.aggregation.fedit import average_head
from fedjax_lora.core import count, trees
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregate, Aggregator, Ranks, Received, Scale
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops.factorise import orthonormal
from fedjax_lora.ops.products import differences


class Layer(NamedTuple):
    """One layer of one module.

    old: the broadcast, a `[n_in, R]` and b `[R, n_out]`.
    received: the server's copies, leaves `[C, ...]`; the broadcast for a client of weight 0.
    counted: `[C, R]`, 0 for a client of weight 0. weights: `[C]`, p_k.
    used: `[R]` bool, the components that the broadcast uses, or that somebody trains, whether it sends them or not.
    key: the layer's own.
    """

    old: Factors
    received: Factors
    counted: Array
    weights: Array
    used: Array
    key: Array


class LayerResult(NamedTuple):
    """The new factors of a layer, and `[n_in, n_out]` to merge into the base, without the scale s; None for never."""

    factors: Factors
    merged: Array | None = None


def by_products(old: Factors, received: Factors, counted: Array, weights: Array) -> tuple[Factors, Array]:
    """The `Enter` of clients that weigh p whatever they count in."""
    del old
    return received, jnp.broadcast_to(weights[:, None], counted.shape)


def by_layer(method: Callable[[Layer], LayerResult]) -> Aggregator:
    """The aggregator of a method that treats each layer of each module alike; heads are averaged by p.

    Where all weights are zero the broadcast stays, whatever the method says. Layers go one after the other: what is
    formed beside the cohort's adapters is a layer's worth, and no two factorisations run side by side.
    """

    def aggregate(
        broadcast: Adapters, trained: Adapters, received: Received, weights: Array, scale: Scale, key: Array
    ) -> Aggregate:
        modules, merged, sparsification, covariance = {}, {}, jnp.zeros(()), jnp.zeros(())
        for name, old in broadcast.modules.items():
            cohort = trained.modules[name], received.adapters.modules[name], received.counted[name]
            module_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            outcome, of_sparsification, of_averaging = _module(method, old, *cohort, weights, module_key)
            modules[name] = outcome.factors
            own = errors.scale_of(scale, name)
            if outcome.merged is not None:
                merged[name] = jnp.reshape(own, (-1, 1, 1)) * outcome.merged
            sparsification += jnp.sum(own**2 * of_sparsification)
            covariance += jnp.sum(own**2 * of_averaging)
        return Aggregate(
            adapters=Adapters(modules=modules, head=average_head(broadcast.head, received.adapters.head, weights)),
            merged=merged,
            sparsification_error=jnp.sqrt(sparsification),
            covariance_error=jnp.sqrt(covariance),
        )

    return Aggregator(aggregate=aggregate, enter=by_products)


def _module(
    method: Callable[[Layer], LayerResult],
    old: Factors,
    trained: Factors,
    decoded: Factors,
    counted: Array,
    weights: Array,
    key: Array,
) -> tuple[LayerResult, Array, Array]:
    """What becomes of one module `[L, ...]`, and the energies `[L]` of both errors."""
    present = weights > 0

    def layer(index: Array) -> tuple[LayerResult, Array, Array]:
        before = trees.take(old, index)
        mine, received, m = jax.tree.map(lambda leaf: leaf[:, index], (trained, decoded, counted))
        mine, received = trees.where(present, (mine, received), (before, before))
        m = jnp.where(present[:, None], m, 0.0)
        used = jnp.any(m > 0, axis=0) | jnp.any(before.b != 0, axis=-1) | jnp.any(mine.b != 0, axis=(0, 2))
        found = method(Layer(before, received, m, weights, used, jax.random.fold_in(key, index)))
        nothing = LayerResult(before, jax.tree.map(jnp.zeros_like, found.merged))
        found = trees.where(jnp.any(present), found, nothing)
        return (
            found,
            errors.sparsification_energy(mine, received, weights, by_products(before, received, m, weights)[1]),
            errors.averaging_energy(received, found.factors, found.merged, weights),
        )

    return jax.lax.map(layer, jnp.arange(old.a.shape[0]))


def fresh(layer: Layer) -> Factors:
    """Factors to start anew: `a` with orthogonal columns, each as long as the broadcast's, and `b` zero."""
    length = jnp.linalg.norm(layer.old.a, axis=0)
    n_in, max_rank = layer.old.a.shape
    a = orthonormal(layer.key, (1, n_in, max_rank))[0]
    return Factors(a=length * a, b=jnp.zeros_like(layer.old.b))


def as_changes(own: dict[str, Factors], held: Adapters, received: Received) -> tuple[Adapters, Received]:
    """What the clients hold and what arrived, `[C, ...]`, as the changes of their products since they began.

    Args:
      own: module name -> the factors that each client began with, `[C, ...]`.
      held: what the clients hold of what they send.
      received: what the server has decoded.

    Returns:
      The same two, modules of 2 R components each, see `ops.products.differences`.
    """
    held, arrived = (
        dataclasses.replace(adapters, modules=differences(adapters.modules, own))
        for adapters in (held, received.adapters)
    )
    counted = {name: jnp.concatenate([mask, mask], axis=-1) for name, mask in received.counted.items()}
    return held, Received(adapters=arrived, counted=counted)


def product_bits(like: Adapters, adapters: int | None, rank: Ranks) -> Count:
    """Bits of what is merged: a matrix for every adapted one, as two stacked factors or, if shorter, in full.

    Args:
      like: adapters, or their shapes.
      adapters: how many of them are stacked; None for the matrices in full, which hold the sum of any number of merges.
      rank: components of each, or of each layer.

    Returns:
      Exact below 2**64.
    """

    def module(name: str, factors: Factors) -> Count:
        layers, n_in, n_out = factors.a.shape[0], factors.a.shape[1], factors.b.shape[2]
        full, width = Count.of(n_in * n_out), (n_in + n_out) * (adapters or 0)
        if not width:
            return full * (32 * layers)
        own = jnp.asarray(rank[name] if isinstance(rank, Mapping) else rank).astype(jnp.uint32)
        matrices = full.minimum(Count.of(width) * own)
        return count.total(matrices[layer] for layer in range(layers)) * 32 if own.ndim else matrices * (32 * layers)

    return count.total(module(name, factors) for name, factors in like.modules.items())
