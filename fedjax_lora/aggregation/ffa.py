"""FFA-LoRA: a stays as it was drawn, b and the head are trained and averaged.

Y. Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
"""

import dataclasses
from typing import Literal

from fedjax_lora.aggregation import fedit
from fedjax_lora.core.exchange import Aggregator, Live
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfaConfig(Options):
    """Train and send b alone; there is nothing to choose."""

    name: Literal["ffa"] = "ffa"


def make(options: FfaConfig, context: Context) -> Aggregator:
    """The aggregator of one shared a: `sum_k p_k a b_k = a sum_k p_k b_k`, so that the covariance error is 0."""
    del options, context  # it has none yet, but every method is made in the same way

    def live(round_number: object) -> Live:
        del round_number
        return Live(a=0.0)

    return fedit.AVERAGE._replace(trains=live)


METHOD = Method("aggregation", "ffa", FfaConfig, make)
