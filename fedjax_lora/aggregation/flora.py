"""FLoRA: the clients' factors are stacked, their product is merged into the frozen weights, and all start anew.

Z. Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import errors
from fedjax_lora.aggregation.products import Layer, LayerResult, by_layer, fresh, product_bits
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregator, Live, Ranks
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters

SEED_BITS = 32
"""What a new a costs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloraConfig(Options):
    """Merge the stack."""

    name: Literal["flora"] = "flora"


def make(options: FloraConfig, context: Context) -> Aggregator:
    """The aggregator that merges `s sum_k p_k a_k b_k` and draws new factors: orthogonal a, zero b.

    The broadcast is charged with the stack of C r components or, where that is shorter or clients sit out rounds and
    have missed some, with the matrix in full. After the first round it holds no factors: clients draw a from the seed
    that comes with it, and b is zero.
    """
    del options, context  # it has none yet, but every method is made in the same way

    def extra_downlink(like: Adapters, clients: int | None, rank: Ranks) -> Count:
        return product_bits(like, clients, rank) + Count.of(SEED_BITS)

    return by_layer(merge_all)._replace(merges=True, stale=factors_once, extra_downlink=extra_downlink)


METHOD = Method(
    "aggregation",
    "flora",
    FloraConfig,
    make,
    needs=frozenset(
        {"dense_broadcast", "whole_at_client", "memoryless_server", "whole_step", "float32_base", "in_step"}
    ),
    breaks=frozenset({"fixed_basis", "lasting_zeros"}),
)


def factors_once(round_number: Array, everyone: bool) -> Live:
    """The `Aggregator.stale` of factors that clients have or draw themselves after the first round."""
    del everyone
    first = jnp.where(round_number > 0, 0.0, 1.0)
    return Live(a=first, b=first)


def merge_all(layer: Layer) -> LayerResult:
    """The whole mean product merged, and new factors."""
    return LayerResult(fresh(layer), mean_product(layer))


def mean_product(layer: Layer) -> Array:
    """`sum_k p_k a_k b_k`, `[n_in, n_out]`."""
    nothing = jax.tree.map(jnp.zeros_like, layer.old)
    return errors.product_gap(layer.received, nothing, layer.weights)
