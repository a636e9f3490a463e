"""LoRA-A2's adaptive rank selection: components by how much their change matters, over the whole adapter.

J. Koo, M. Jang and J. Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients",
ACL 2025. Its other half, the alternating freeze, is the aggregator's: one factor is in scope each round. A round in
which both are is our extension.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers import ranks
from fedjax_lora.sparsifiers.soft import importance


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraA2Config(Options):
    """Send the changes of as many components in all as k a matrix, those of the largest scores."""

    name: Literal["lora_a2"] = "lora_a2"

    def note(self, broken: Collection[str]) -> str | None:
        """The half of LoRA-A2 that is missing where both factors are sent in every round."""
        if "factors_together" in broken:
            return None
        return (
            "sparsifier: lora_a2 is LoRA-A2's choice of ranks alone; a round in which both factors are sent is our "
            "extension; an aggregation that takes turns with the factors is the other half"
        )


def score(new: Factors, old: Factors) -> Array:
    """`||a0_i db_i||_F + ||da_i b_i||_F` of each component: the norm of its change, where one factor changed.

    Where both did, the change is the sum of the two products, and its norm is at most this.

    Args:
      new: trained factors, a `[..., n_in, R]` and b `[..., R, n_out]`.
      old: the broadcast, a0 and b0.

    Returns:
      `[..., R]`, >= 0.
    """
    return importance(old.a, new.b - old.b) + importance(new.a - old.a, new.b)


def make(options: LoraA2Config, context: Context) -> Sparsifier:
    """The sparsifier of the components with the largest scores, over the whole adapter; what was not sent is unchanged.

    Its tail energy is the sum of squared scores left out.
    """
    del options  # it has no option yet, but every method is made in the same way
    like = ranks.shapes(context)

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        scores = _scores(start, trained, scope, outside=0.0).values()
        tail_energy = ranks.tail_energy(jnp.concatenate(list(scores)) ** 2, "global")
        return ranks.offer(tail_energy, ranks.planned_size(ranks.each(scope.ranks), "global", like, scope))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        scores = _scores(start, trained, scope, outside=-1.0)
        chosen = ranks.choose(scores, ranks.whole(kept, scope.ranks), "global", scope)
        return ranks.encode(start, trained, chosen, scope, ranks.chosen_index_bits(chosen, "global"))

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        return ranks.decode(start, message, scope, "zero")

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method(
    "sparsifier",
    "lora_a2",
    LoraA2Config,
    make,
    needs=frozenset({"shared_b"}),
    breaks=frozenset({"everything_sent"}),
)


def _scores(start: Adapters, trained: Adapters, scope: Scope, outside: float) -> dict[str, Array]:
    """`[L, R]` scores by module, `outside` for the ranks that are not in use."""
    return {
        name: jnp.where(scope.of_module(name) > 0, score(factors, start.modules[name]), outside)
        for name, factors in trained.modules.items()
    }
