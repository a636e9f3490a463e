"""FedEx-LoRA: factors are averaged apart, and what that misses is merged into the frozen weights.

R. Singhal, K. Ponkshe, P. Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", arXiv 2410.09432.
"""

import dataclasses
from typing import Literal

from fedjax_lora.aggregation import errors, flora
from fedjax_lora.aggregation.fedit import average_factors
from fedjax_lora.aggregation.products import Layer, Outcome, by_layer, product_bits
from fedjax_lora.options import Options
from fedjax_lora.strategies import Aggregator

Start = Literal["average", "reinit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedExConfig(Options):
    """Merge what the average of the factors misses.

    start: what the clients start from: the `average` of the factors, or factors drawn anew (`reinit`), with the whole
      mean product merged. That they keep their own is left out: it needs frozen weights for each client.
    """

    name: Literal["fedex"] = "fedex"
    start: Start = "average"


def make(config: FedExConfig) -> Aggregator:
    """The aggregator whose base, after `merged` is added, and factors hold the ideal average of products.

    The residual `sum_k p_k a_k b_k - abar bbar` has rank C r at most, at which it is charged: the clients' factors span
    their average's too. Where clients sit out rounds, the sum of those that one has missed is charged as matrices in
    full. Factors drawn anew over a base that holds the whole mean product are FLoRA.
    """
    if config.start == "reinit":
        return flora.make(flora.FloraConfig())
    return Aggregator(aggregate=by_layer(_residual), merges=True, extra_downlink_bits=product_bits)


def _residual(layer: Layer) -> Outcome:
    mean = average_factors(layer.old, layer.received, layer.counted, layer.weights)
    return Outcome(mean, errors.product_gap(layer.received, mean, layer.weights))
