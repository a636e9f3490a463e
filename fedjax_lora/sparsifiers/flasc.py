"""FLASC: sparse downloads, dense local training, sparse uploads.

K. Kuo, A. Raje, K. Rajesh and V. Smith, "Federated LoRA with Sparse Communication", arXiv 2406.05233. The clients
start from the largest values of the global adapters with zeros elsewhere, train all of them, and send the values
that changed the most. The server adds the mean change to its own adapters, which stay dense.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.exchange import Message, Size, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlascConfig(Options):
    """Download the `download_ratio` of the global factors' values; upload of their changes what is to be kept.

    download_ratio: 0 < download_ratio <= 1.
    """

    name: Literal["flasc"] = "flasc"
    download_ratio: float = traced(0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.download_ratio <= 1.0:
            raise ValueError(f"download_ratio must be above 0 and at most 1, got {self.download_ratio}")


def make(options: FlascConfig, context: Context) -> Sparsifier:
    """`top_k` with a sparse broadcast.

    One broadcast serves clients of every rank, so its values are chosen over the structural rank, and a client is
    charged for those in its own; what is zero in any case is not sent. A factor that is out of scope is at the clients
    already: it stays whole, as do ranks that are not in use.
    """

    def broadcast(adapters: Adapters, scope: Scope, ranks: Array) -> tuple[Adapters, Size]:
        nothing = jax.tree.map(jnp.zeros_like, adapters)
        kept = top_k.num_kept(options.download_ratio, top_k.pool_size(adapters, scope))
        masks = top_k.chosen(adapters.modules, nothing.modules, kept, scope)
        modules = jax.tree.map(lambda mask, x: jnp.where(mask, x, 0.0), masks, adapters.modules)
        sparse = scope.select(dataclasses.replace(adapters, modules=modules), adapters)
        return sparse, _received_size(sparse, dataclasses.replace(scope, ranks=ranks))

    return top_k.make(top_k.TopKConfig(), context)._replace(broadcast=broadcast)


def _received_size(sparse: Adapters, own: Scope) -> Size:
    """The size of what a client with this scope is sent: the entries that are not zero, and the head."""
    received = own.select(sparse, jax.tree.map(jnp.zeros_like, sparse))
    nonzero = jax.tree.map(lambda leaf: leaf != 0, received.modules)
    count = sum((jnp.sum(mask, dtype=jnp.uint32) for mask in jax.tree.leaves(nonzero)), jnp.uint32(0))
    return payload.message_size(
        Message(
            tensors=received,
            sent=Adapters(modules=nonzero, head=payload.sent_head(received, own)),
            index_bits=top_k.index_bits(count, top_k.pool_size(sparse, own)),
            kept_ranks=jnp.sum(own.ranks),
            dropped_energy=jnp.zeros(()),
        )
    )


METHOD = Method(
    "sparsifier",
    "flasc",
    FlascConfig,
    make,
    needs=frozenset({"even_ranks"}),
    breaks=frozenset({"everything_sent", "dense_broadcast"}),
)
