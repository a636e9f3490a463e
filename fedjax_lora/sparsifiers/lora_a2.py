"""LoRA-A2's adaptive rank selection: components by how much their change matters, over the whole adapter.

J. Koo, M. Jang and J. Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients",
ACL 2025. Its other half, the alternating freeze, is the aggregator's: one factor is in scope each round. A round in
which both are is our extension.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers import payload, ranks
from fedjax_lora.sparsifiers.soft import importance
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraA2Config(Options):
    """Send the changes of as many components in all as k a matrix, those of the largest scores."""

    orthogonality: ClassVar[float] = 0.0
    name: Literal["lora_a2"] = "lora_a2"


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


def make(config: LoraA2Config, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of the components with the largest scores, over the whole adapter; what was not sent is unchanged.

    Its tail energy is the sum of squared scores left out.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the changes of the numbers travel.
    """
    del config  # it has no option yet, but every method is made in the same way
    payload.check_fits(like)

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        kept = ranks.num_kept(keep_ratio, scope.ranks)
        chosen = ranks.choose(_scores(start, trained, scope, outside=-1.0), kept, "global", scope.ranks)
        bits = ranks.chosen_bits(chosen, "global", like, scope, wire)
        return ranks.send_changes(start, trained, chosen, bits, scope, wire, key), memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        scores = _scores(start, trained, scope, outside=0.0).values()
        return ranks.tail_energy(jnp.concatenate(list(scores)) ** 2, "global")

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=lambda keep_ratio, scope: ranks.planned_bits(keep_ratio, "global", like, scope, wire),
        compress=compress,
    )


def _scores(start: Adapters, trained: Adapters, scope: Scope, outside: float) -> dict[str, Array]:
    """`[L, R]` scores by module, `outside` for the ranks that are not in use."""
    return {
        name: jnp.where(scope.ranks > 0, score(factors, start.modules[name]), outside)
        for name, factors in trained.modules.items()
    }
