"""FLASC: sparse downloads, dense local training, sparse uploads.

K. Kuo, A. Raje, K. Rajesh and V. Smith, "Federated LoRA with Sparse Communication", arXiv 2406.05233. The clients
start from the largest values of the global adapters with zeros elsewhere, train all of them, and send the values
that changed the most. The server adds the mean change to its own adapters, which stay dense.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import top_k
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlascConfig(Options):
    """Download the `download_ratio` of the global factors' values; upload the `keep_ratio` of their changes.

    download_ratio: 0 < download_ratio <= 1.
    """

    orthogonality: ClassVar[float] = 0.0
    name: Literal["flasc"] = "flasc"
    download_ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.download_ratio <= 1.0:
            raise ValueError(f"download_ratio must be above 0 and at most 1, got {self.download_ratio}")


def make(config: FlascConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """`top_k` with a sparse broadcast.

    One broadcast serves clients of every rank, so its values are chosen over the structural rank, and a client is
    charged for those in its own; what is zero in any case is not sent. A factor that is out of scope is at the clients
    already: it stays whole, as do ranks that are not in use.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the uploaded changes travel.
    """

    def broadcast(adapters: Adapters, scope: Scope, ranks: Array) -> tuple[Adapters, Array]:
        nothing = jax.tree.map(jnp.zeros_like, adapters)
        pool = scope.select(adapters, nothing)
        kept = top_k.num_kept(config.download_ratio, top_k.pool_size(like, scope))
        sparse = dataclasses.replace(adapters, modules=top_k.sparsified(pool.modules, nothing.modules, kept))
        sparse = scope.select(sparse, adapters)
        own = dataclasses.replace(scope, ranks=ranks)
        received = jax.tree.leaves(own.select(sparse, nothing).modules)
        count = sum((jnp.count_nonzero(leaf).astype(jnp.uint32) for leaf in received), jnp.uint32(0))
        return sparse, top_k.bits(count, like, own, FLOAT32)

    return top_k.make(top_k.TopKConfig(), like, wire)._replace(broadcast=broadcast)
