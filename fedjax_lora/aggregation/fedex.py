"""FedEx-LoRA: factors are averaged apart, and what that misses is merged into the frozen weights.

R. Singhal, K. Ponkshe, P. Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", arXiv 2410.09432.
"""

import dataclasses
from typing import Literal

from jax import Array

from fedjax_lora.aggregation import errors, flora
from fedjax_lora.aggregation.fedit import average_factors
from fedjax_lora.aggregation.products import Layer, LayerResult, by_layer, by_products, product_bits
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregate, Aggregator, Ranks, Received, Scale
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters
from fedjax_lora.ops.products import differences

Start = Literal["average", "reinit", "keep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedExConfig(Options):
    """Merge what the average of the factors misses.

    start: what the clients start from: the `average` of the factors; factors drawn anew (`reinit`), with the whole
      mean product merged; or what they had themselves (`keep`), with the mean change of the products merged.
    """

    name: Literal["fedex"] = "fedex"
    start: Start = "average"

    def needs(self) -> dict[str, str]:
        needed = ("everything_sent", "exact_wire", "one_rank", "zero_start")
        return dict.fromkeys(needed, "start") if self.start == "keep" else {}

    def breaks(self) -> dict[str, str]:
        broken = {
            "average": (),
            "reinit": ("fixed_basis", "lasting_zeros"),
            "keep": ("fixed_basis", "start_from_broadcast"),
        }
        return dict.fromkeys(broken[self.start], "start")


def make(options: FedExConfig, context: Context) -> Aggregator:
    """The aggregator whose base, after `merged` is added, and factors hold the ideal average of products.

    The residual `sum_k p_k a_k b_k - abar bbar` has rank C r at most, at which it is charged: the clients' factors span
    their average's too. Where clients sit out rounds, the sum of those that one has missed is charged as matrices in
    full. Factors drawn anew over a base that holds the whole mean product are FLoRA.

    Who keeps its factors a0, b0 computes with `base + s (a b - a0 b0)`, so that one base serves all. The mean of these
    changes has rank 2 C r at most, and the server, whose b stays 0, has no product of its own.
    """
    if options.start == "reinit":
        return flora.make(flora.FloraConfig(), context)
    if options.start == "keep":
        return Aggregator(
            aggregate=_merge_changes,
            enter=by_products,
            merges=True,
            resumes=True,
            stale=flora.factors_once,
            extra_downlink=_bits_of_changes,
        )
    return by_layer(_residual)._replace(merges=True, extra_downlink=product_bits)


METHOD = Method(
    "aggregation",
    "fedex",
    FedExConfig,
    make,
    needs=frozenset(
        {"dense_broadcast", "whole_at_client", "memoryless_server", "whole_step", "float32_base", "in_step"}
    ),
)


def _residual(layer: Layer) -> LayerResult:
    mean = average_factors(layer.old, layer.received, layer.counted, layer.weights)
    return LayerResult(mean, errors.product_gap(layer.received, mean, layer.weights))


def _bits_of_changes(like: Adapters, clients: int | None, rank: Ranks) -> Count:
    """Who sits out may not have its first factors yet: it draws them from a seed."""
    if clients is None:
        return product_bits(like, None, rank) + Count.of(flora.SEED_BITS)
    return product_bits(like, 2 * clients, rank)


def _merge_changes(
    broadcast: Adapters, trained: Adapters, received: Received, weights: Array, scale: Scale, key: Array
) -> Aggregate:
    """The mean change of the clients' products merged, of factors of 2 R components; the broadcast's stay."""
    # A product of 0 in as many components, for who is absent.
    start = dataclasses.replace(broadcast, modules=differences(broadcast.modules, broadcast.modules))
    merge = by_layer(lambda layer: LayerResult(layer.old, flora.mean_product(layer))).aggregate
    found = merge(start, trained, received, weights, scale, key)
    return found._replace(adapters=dataclasses.replace(found.adapters, modules=broadcast.modules))
