"""LoRA-FAIR: factors are averaged apart, then b is corrected at the server towards the mean product.

J. Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", arXiv
2411.14961, which corrects by gradient steps on a similarity; ridge least squares, which has a closed form, is ours.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from fedjax_lora.aggregation.fedit import average_factors
from fedjax_lora.aggregation.products import Layer, LayerResult, by_layer
from fedjax_lora.core.exchange import Aggregator
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Factors
from fedjax_lora.ops import factorise
from fedjax_lora.ops.products import gram


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFairConfig(Options):
    """Correct the average of b.

    regularisation: lambda > 0, how hard the correction is held back; beside the squared lengths of a's columns.
    """

    name: Literal["lora_fair"] = "lora_fair"
    regularisation: float = traced(0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.regularisation < float("inf"):
            raise ValueError(f"regularisation must be positive and finite, got {self.regularisation}")


def make(options: LoraFairConfig, context: Context) -> Aggregator:
    """The aggregator that adds to `bbar` the d of least `||sum_k p_k a_k b_k - abar (bbar + d)||^2 + lambda ||d||^2`.

    It is `(abar^T abar + lambda I)^-1 abar^T (sum_k p_k a_k b_k - abar bbar)`, through R x R matrices alone.
    """

    del context  # shapes are those of what arrives

    def correct(layer: Layer) -> LayerResult:
        mean = average_factors(layer.old, layer.received, layer.counted, layer.weights)
        a = mean.a * layer.used  # a rank that nobody uses is not to fill
        energies, basis = factorise.eigh(gram(a))
        target = _projected_gap(a, layer.received, mean, layer.weights)
        # Rounding may leave an eigenvalue below zero; lambda then still bounds the inverse.
        shrunk = _matmul(basis.T, target) / (jnp.maximum(energies, 0.0) + options.regularisation)[:, None]
        correction = jnp.where(layer.used[:, None], _matmul(basis, shrunk), 0.0)
        return LayerResult(Factors(a=mean.a, b=mean.b + correction))

    return by_layer(correct)


METHOD = Method(
    "aggregation", "lora_fair", LoraFairConfig, make, needs=frozenset({"dense_broadcast", "whole_at_client"})
)


def _projected_gap(a: Array, received: Factors, server: Factors, weights: Array) -> Array:
    """`a^T (sum_k p_k a_k b_k - server's product)`, `[R, n_out]`, see `errors.product_gap`."""
    p = weights[:, None, None]
    cross = _matmul(a.T, p * (received.a - server.a))
    return jnp.sum(_matmul(cross, received.b), axis=0) + _matmul(
        _matmul(a.T, server.a), jnp.sum(p * (received.b - server.b), axis=0)
    )


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=Precision.HIGHEST)
