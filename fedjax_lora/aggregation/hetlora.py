"""HetLoRA: clients of different ranks, padded with zeros and weighted by what they have learned.

Y. J. Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv
2401.06432. Ours: the weights also count the clients' own p_k, and each layer of each module has weights of its own;
ranks are pruned by a threshold on energy, where the paper regularises the trailing ranks and compares their norms.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import fedit
from fedjax_lora.base import Adapters, Factors
from fedjax_lora.ops.products import product_energy
from fedjax_lora.options import Options
from fedjax_lora.strategies import Aggregator

FLOOR_SLACK = 1e-4
"""Added before rounding down, so that a product rounded to float32 does not lose a rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HetLoraConfig(Options):
    """How clients lower their own ranks.

    prune: gamma in (0, 1]: a client of rank r falls to `max(1, floor(gamma r))`; 1 leaves the ranks as they are.
    tolerance: it does so where the ranks it would lose hold less than this share of its energy.
    """

    name: Literal["hetlora"] = "hetlora"
    prune: float = 1.0
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.prune <= 1.0:
            raise ValueError(f"prune must be in (0, 1], got {self.prune}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance must be in [0, 1], got {self.tolerance}")


def make(config: HetLoraConfig) -> Aggregator:
    """The aggregator of zero-padded factors, with pruning of the clients' ranks."""

    def next_rank(trained: Adapters, rank: Array) -> Array:
        shorter = jnp.maximum(jnp.floor(config.prune * rank + FLOOR_SLACK), 1.0)
        tail, whole = _energy(trained, shorter, rank), _energy(trained, 0.0, rank)
        return jnp.where(tail < config.tolerance * whole, shorter, rank)

    return Aggregator(aggregate=fedit.averaging(zero_padded), next_rank=next_rank)


def zero_padded(old: Factors, received: Factors, counted: Array, weights: Array) -> tuple[Factors, Array]:
    """The `fedit.Enter` in which client k weighs `p_k ||a_k b_k||_F`, normalised, and is zero where it does not count.

    Where nobody counts, all enter with the broadcast; where all products are zero, all weigh p.
    """
    own = jnp.where(weights[:, None] > 0, counted, 0.0)
    a, b = received.a * own[:, None, :], received.b * own[:, :, None]
    raw = weights * jnp.sqrt(product_energy(a, b))
    total = jnp.sum(raw)
    w = jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), weights)
    anyone = jnp.any(own > 0, axis=0)
    entering = Factors(a=jnp.where(anyone, a, old.a), b=jnp.where(anyone[:, None], b, old.b))
    return entering, jnp.broadcast_to(w[:, None], counted.shape)


def _energy(adapters: Adapters, first: Array | float, stop: Array) -> Array:
    """Squared norm of the product of the components `first <= i < stop`, summed over modules and layers."""
    energies = []
    for factors in adapters.modules.values():
        rank = jnp.arange(factors.a.shape[-1])
        energies.append(jnp.sum(product_energy(factors.a * ((rank >= first) & (rank < stop)), factors.b)))
    return jnp.sum(jnp.stack(energies))
