"""A sparsifier that sends b alone: of each client's update the factors b of all ranks, and the head.

    fedjax-lora run CONFIG --methods examples/methods/send_b.py --set sparsifier=send_b

The server puts the b that it receives beside the a of its own broadcast. With `aggregation: ffa` the clients train no
a, and nothing is lost; elsewhere what a client learned in a is lost, and counts as `dropped_energy`.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.methods import Adapters, Context, Count, Message, Method, Offer, Options, Received, Scope, Sparsifier
from fedjax_lora.sparsifiers import diagnostics, payload, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SendBConfig(Options):
    """All ranks of b, however many are to be kept."""

    name: Literal["send_b"] = "send_b"


def make(options: SendBConfig, context: Context) -> Sparsifier:
    """The sparsifier of the scope without a: `r n_out` values a matrix, and no index."""
    like = ranks.shapes(context)

    def b_alone(scope: Scope) -> Scope:
        return dataclasses.replace(scope, a=jnp.zeros(()))

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        # Kept ranks change nothing: all cost the same, and none leaves out more than another.
        return ranks.offer(jnp.zeros(ranks.max_rank(like) + 1), payload.dense_size(like, b_alone(scope)))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        everywhere = ranks.in_use(scope, like)
        # `Message.sent` marks b and the head; bits are counted from it.
        message = ranks.encode(start, trained, everywhere, b_alone(scope), index_bits=Count.of(0))
        arrives = b_alone(scope).select(trained, start)
        return message._replace(dropped_energy=diagnostics.difference_energy(trained, arrives, everywhere))

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        return ranks.decode(start, message, b_alone(scope), missing="zero")

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method(
    "sparsifier",
    "send_b",
    SendBConfig,
    make,
    needs=frozenset({"shared_b"}),  # else nothing but the head would be sent
    breaks=frozenset({"everything_sent"}),
)
