"""Rank components chosen by chance: what a choice by importance has to beat.

The random mask of J. Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency",
arXiv 1610.05492, here over rank components: the server draws the client's choice again from its seed.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload, ranks
from fedjax_lora.sparsifiers.ranks import Missing
from fedjax_lora.sparsifiers.soft import importance

SEED_BITS = 32
"""What the choice costs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRankConfig(Options):
    """Send the changes of k components of each matrix, any k with the same probability.

    missing: how a component that was not sent enters the average. `senders`: the client has no say in it, as in `soft`,
      so that the choice is all that differs. `zero`: as no change.
    """

    name: Literal["random_rank"] = "random_rank"
    missing: Missing = "senders"

    def breaks(self) -> dict[str, str]:
        """A component that its client has no say in is not unchanged."""
        return {"unchanged_where_unsent": "missing"} if self.missing == "senders" else {}


def make(options: RandomRankConfig, context: Context) -> Sparsifier:
    """The sparsifier of random components; the index is a seed.

    Its tail energy is the mean over all choices of the components' squared changes left out, `(1 - k / r)` of all.
    """
    like = ranks.shapes(context)
    max_rank = ranks.max_rank(like)

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        tail_energy, number = jnp.zeros(max_rank + 1), jnp.arange(max_rank + 1)[:, None]
        for name, f in trained.modules.items():
            f0, mask = start.modules[name], scope.of_module(name)
            energy = jnp.sum(mask * importance(f.a, f.b, f0.a, f0.b) ** 2, axis=-1)
            tail_energy += jnp.sum(energy * jnp.maximum(1.0 - number / jnp.sum(mask, axis=-1), 0.0), axis=-1)
        kept = ranks.kept_in_layers(ranks.each(scope.ranks), like, scope)
        sums = {name: jnp.sum(of_layers, axis=-1) for name, of_layers in kept.items()}
        counts = {name: (count, count) for name, count in sums.items()}
        return ranks.offer(tail_energy, payload.component_size(like, counts, scope, index_bits=Count.of(SEED_BITS)))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        scores = {}
        for name, part in zip(sorted(like.modules), jax.random.split(key, len(like.modules)), strict=True):
            drawn = jax.random.uniform(part, (like.modules[name].a.shape[0], max_rank))
            scores[name] = jnp.where(scope.of_module(name) > 0, drawn, -1.0)
        chosen = ranks.choose(scores, ranks.whole(kept, scope.ranks), "module", scope)
        return ranks.encode(start, trained, chosen, scope, Count.of(SEED_BITS))

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        return ranks.decode(start, message, scope, options.missing)

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method(
    "sparsifier",
    "random_rank",
    RandomRankConfig,
    make,
    needs=frozenset({"shared_b"}),
    breaks=frozenset({"everything_sent"}),
)
