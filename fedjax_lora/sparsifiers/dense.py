"""Everything is sent: FedIT's uplink, and the reference of the other methods."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(Options):
    """Send all ranks, however many are to be kept."""

    name: Literal["dense"] = "dense"


def make(options: DenseConfig, context: Context) -> Sparsifier:
    """The sparsifier that sends all r ranks of every layer of every module: `r (n_in + n_out)` values a matrix.

    Its tail energy is zero throughout, since nothing is ever left out.
    """
    del options  # it has no option yet, but every method is made in the same way
    like = ranks.shapes(context)

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        return ranks.offer(jnp.zeros(ranks.max_rank(like) + 1), payload.dense_size(like, scope))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        message = ranks.encode(start, trained, ranks.in_use(scope, like), scope, Count.of(0))
        kept = message.kept_ranks if scope.layer_ranks else jnp.sum(scope.ranks)
        return message._replace(kept_ranks=kept, dropped_energy=jnp.zeros(()))

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        return ranks.decode(start, message, scope, "zero")

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method("sparsifier", "dense", DenseConfig, make)
