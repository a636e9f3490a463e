"""An aggregator that trims: of each value of the factors and of the head, the largest and the smallest do not count.

    fedjax-lora run CONFIG --methods examples/methods/trimmed_mean.py --set aggregation=trimmed_mean

D. Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, arXiv 1803.01498;
here with weights, so that a client that is cut through counts in part. `trim: 0` is the mean; the nearer to 0.5, the
nearer to the median.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.aggregation.fedit import by_senders
from fedjax_lora.aggregation.products import Layer, LayerResult, by_layer
from fedjax_lora.methods import Adapters, Aggregate, Aggregator, Context, Factors, Method, Options, Received, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimmedMeanConfig(Options):
    """The mean of the middle.

    trim: share of the clients' weight that is left out at either end.
    """

    name: Literal["trimmed_mean"] = "trimmed_mean"
    trim: float = traced(0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim must be at least 0 and below 0.5, got {self.trim!r}")


def make(options: TrimmedMeanConfig, context: Context) -> Aggregator:
    """The aggregator of each factor apart; a component is averaged over those who sent it."""

    def of_layer(layer: Layer) -> LayerResult:
        # w [C, R] sums to 1 over the clients: those who did not send a component have no say in it.
        theirs, w = by_senders(layer.old, layer.received, layer.counted, layer.weights)
        a = layer.old.a + trimmed_mean(theirs.a - layer.old.a, w[:, None, :], options.trim)
        b = layer.old.b + trimmed_mean(theirs.b - layer.old.b, w[:, :, None], options.trim)
        return LayerResult(Factors(a=a, b=b))

    by_layers = by_layer(of_layer)

    def aggregate(
        broadcast: Adapters, trained: Adapters, received: Received, weights: Array, scale: Array, key: Array
    ) -> Aggregate:
        found = by_layers.aggregate(broadcast, trained, received, weights, scale, key)

        def of_head(old: Array, heads: Array) -> Array:
            w = weights.reshape((-1,) + (1,) * old.ndim)
            return old + trimmed_mean(jnp.where(w > 0, heads - old, 0.0), w, options.trim)  # an absent one may be NaN

        head = jax.tree.map(of_head, broadcast.head, received.adapters.head)
        return found._replace(adapters=dataclasses.replace(found.adapters, head=head))

    return by_layers._replace(aggregate=aggregate)


def trimmed_mean(values: Array, weights: Array, trim: ArrayLike) -> Array:
    """`[...]` the mean of values `[C, ...]` without the share `trim` of the weight at either end.

    Args:
      values: finite.
      weights: broadcast against them; they sum to 1 over C, or are all 0, which gives 0.
      trim: in [0, 0.5).
    """
    order = jnp.argsort(values, axis=0)
    values = jnp.take_along_axis(values, order, axis=0)
    weights = jnp.take_along_axis(jnp.broadcast_to(weights, values.shape), order, axis=0)
    ends = jnp.cumsum(weights, axis=0)
    inside = jnp.minimum(ends, 1.0 - trim) - jnp.maximum(ends - weights, trim)
    return jnp.sum(jnp.maximum(inside, 0.0) * values, axis=0) / (1.0 - 2.0 * trim)


METHOD = Method("aggregation", "trimmed_mean", TrimmedMeanConfig, make)
