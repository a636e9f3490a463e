"""Rank components chosen by chance: what a choice by importance has to beat.

The random mask of J. Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency",
arXiv 1610.05492, here over rank components: the server draws the client's choice again from its seed.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload, ranks
from fedjax_lora.sparsifiers.soft import Missing, importance
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire

SEED_BITS = 32
"""What the choice costs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRankConfig(Options):
    """Send the changes of k components of each matrix, any k with the same probability.

    missing: how a component that was not sent enters the average. `senders`: the client has no say in it, as in `soft`,
      so that the choice is all that differs. `zero`: as no change.
    """

    orthogonality: ClassVar[float] = 0.0
    name: Literal["random_rank"] = "random_rank"
    missing: Missing = "senders"


def make(config: RandomRankConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of random components; the index is a seed.

    Its tail energy is the mean over all choices of the components' squared changes left out, `(1 - k / r)` of all.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the changes of the numbers travel.
    """
    payload.check_fits(like)
    max_rank = ranks.max_rank(like)

    def bits(keep_ratio: Array, scope: Scope) -> Array:
        kept = ranks.num_kept(keep_ratio, scope.ranks)
        parts = [payload.component_bits(kept * f.a.shape[0], f, scope, wire) for f in like.modules.values()]
        return sum(parts, payload.common_bits(like, scope, wire) + jnp.uint32(SEED_BITS))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        choice_key, wire_key = jax.random.split(key)
        scores = {}
        for name, part in zip(sorted(like.modules), jax.random.split(choice_key, len(like.modules)), strict=True):
            drawn = jax.random.uniform(part, (like.modules[name].a.shape[0], max_rank))
            scores[name] = jnp.where(scope.ranks > 0, drawn, -1.0)
        chosen = ranks.choose(scores, ranks.num_kept(keep_ratio, scope.ranks), "module", scope.ranks)
        sent = ranks.send_changes(start, trained, chosen, bits(keep_ratio, scope), scope, wire, wire_key)
        return dataclasses.replace(sent, counted=chosen) if config.missing == "senders" else sent, memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        total = jnp.zeros(())
        for name, f in trained.modules.items():
            f0 = start.modules[name]
            total += jnp.sum(scope.ranks * importance(f.a, f.b, f0.a, f0.b) ** 2)
        return total * jnp.maximum(1.0 - jnp.arange(max_rank + 1) / jnp.sum(scope.ranks), 0.0)

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=lambda keep_ratio, scope: bits(keep_ratio, scope).astype(jnp.float32),
        compress=compress,
    )
