"""FlexLoRA: the products are averaged, and the average is cut back to R ranks by its singular values.

J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505. The balanced split of the singular values is our choice.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from fedjax_lora.aggregation.products import Layer, LayerResult, by_layer
from fedjax_lora.core.exchange import Aggregator
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Factors
from fedjax_lora.ops import factorise


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexLoraConfig(Options):
    """Average the products."""

    name: Literal["flexlora"] = "flexlora"


def make(options: FlexLoraConfig, context: Context) -> Aggregator:
    """The aggregator of the best factors for the mean product (Eckart-Young): `a = U sqrt(S)`, `b = sqrt(S) V^T`.

    Components come sorted, so that a client of lower rank, which masks the last of them, starts from the best of its
    rank. What is cut off is the covariance error. A component that no singular value is left for keeps its a, with
    zero b: it can be trained again.
    """
    del options, context  # it has none yet, but every method is made in the same way
    return by_layer(_truncate)


METHOD = Method(
    "aggregation",
    "flexlora",
    FlexLoraConfig,
    make,
    needs=frozenset({"dense_broadcast", "whole_at_client", "memoryless_server", "whole_step"}),
    breaks=frozenset({"fixed_basis", "lasting_zeros"}),
)


def _truncate(layer: Layer) -> LayerResult:
    max_rank = layer.old.a.shape[-1]
    u, size, v = mean_product_svd(layer.received, layer.weights)
    missing = max(max_rank - size.shape[0], 0)
    u = jnp.pad(u, ((0, 0), (0, missing)))[:, :max_rank]
    v = jnp.pad(v, ((0, missing), (0, 0)))[:max_rank]
    size = jnp.pad(size, (0, missing))[:max_rank]
    position = jnp.arange(max_rank)
    rank = jnp.max(jnp.where(layer.used, position + 1, 0))
    noise = size[0] * max(u.shape[0], v.shape[1]) * jnp.finfo(size.dtype).eps
    kept = (position < rank) & (size > noise)
    root = jnp.sqrt(jnp.where(kept, size, 0.0))
    return LayerResult(Factors(a=jnp.where(kept, u * root, layer.old.a), b=root[:, None] * v))


def mean_product_svd(received: Factors, weights: Array) -> tuple[Array, Array, Array]:
    """U `[n_in, m]`, S `[m]` and V^T `[m, n_out]` of `sum_k p_k a_k b_k`, sorted.

    Where the stack of C R components is thinner than the matrix, m = C R: both thin factors are reduced by QR, and
    the SVD is that of the small core. Else it is the matrix's.

    Args:
      received: a `[C, n_in, R]` and b `[C, R, n_out]`.
      weights: `[C]`, p_k.
    """
    n_in, n_out = received.a.shape[1], received.b.shape[2]
    columns = jnp.moveaxis(weights[:, None, None] * received.a, 0, 1).reshape(n_in, -1)
    rows = received.b.reshape(-1, n_out)
    if rows.shape[0] >= min(n_in, n_out):
        u, size, v = factorise.svd(_matmul(columns, rows))
        return u, size, v
    left, left_core = factorise.qr(columns)
    right, right_core = factorise.qr(rows.T)
    u, size, v = factorise.svd(_matmul(left_core, right_core.T))
    return _matmul(left, u), size, _matmul(v, right.T)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=Precision.HIGHEST)
