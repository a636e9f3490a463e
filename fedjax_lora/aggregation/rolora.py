"""RoLoRA: b is trained in one round and a in the next.

S. Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025,
arXiv 2502.01755.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import fedit
from fedjax_lora.core.exchange import Aggregator, Live
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoLoraConfig(Options):
    """Train and send one factor a round; there is nothing to choose."""

    name: Literal["rolora"] = "rolora"


def make(options: RoLoraConfig, context: Context) -> Aggregator:
    """The aggregator that alternates: b in even rounds, a in odd ones, counted from 0; the head in all.

    The other factor is one for all clients, so that the covariance error is 0. The first round is b's: as long as b
    is 0, the gradient to a is 0. Clients are sent the factor that was trained in the round before, or both in the
    first round and where clients sit out rounds: who did so knows neither.
    """
    del options, context  # it has none yet, but every method is made in the same way

    def live(round_number: Array) -> Live:
        of_a = jnp.asarray(round_number % 2, jnp.float32)
        return Live(a=of_a, b=1.0 - of_a)

    def stale(round_number: Array, everyone: bool) -> Live:
        if not everyone:
            return Live()
        return Live(*(jnp.where(round_number > 0, part, 1.0) for part in live(round_number - 1)))

    return fedit.AVERAGE._replace(trains=live, stale=stale)


METHOD = Method(
    "aggregation",
    "rolora",
    RoLoraConfig,
    make,
    needs=frozenset({"dense_broadcast", "memoryless_server"}),
    breaks=frozenset({"factors_together"}),
)
