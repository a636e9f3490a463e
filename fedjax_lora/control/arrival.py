"""When the server steps: once all of a round have ended, or as soon as a buffer of updates is full.

Buffered: J. Nguyen, K. Malik, H. Zhan, A. Yousefpour, M. Rabbat, M. Malek, D. Huba, "Federated Learning with Buffered
Asynchronous Aggregation", arXiv 2106.06639. That a client whose next update is ready before the buffer is full waits
for the next buffer is our choice, and so is how the band is shared, see docs/asynchronous.md.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Arrival
from fedjax_lora.core.numbers import Options, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynchronousConfig(Options):
    """All clients of a round begin together, and the server waits for the last of them."""

    name: Literal["synchronous"] = "synchronous"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferedConfig(Options):
    """Clients begin and end at times of their own; the server takes the first updates, late ones for less.

    buffer: updates that a step of the server takes, M; at most as many as clients run at once.
    staleness: what a change counts whose client began s steps of the server ago: `polynomial` is (1 + s)^-exponent,
      `constant` is 1.
    exponent: of `polynomial`.
    """

    name: Literal["buffered"] = "buffered"
    buffer: int = 10
    staleness: Literal["polynomial", "constant"] = "polynomial"
    exponent: float = traced(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {self.buffer!r}")
        if not 0 <= self.exponent <= 100:
            raise ValueError(f"exponent must be between 0 and 100, got {self.exponent!r}")


def synchronous(options: SynchronousConfig, context: Context) -> Arrival:
    """Rounds."""
    del options, context
    return Arrival()


def buffered(options: BufferedConfig, context: Context) -> Arrival:
    """Steps of the server by the first updates of the clients that run.

    Raises:
      ValueError: fewer clients run at once than a step takes.
    """
    if options.buffer > context.cohort_size:
        most = f"{context.cohort_size}, the clients that run at once (clients.per_round)"
        raise ValueError(f"arrival.buffer must be at most {most}, got {options.buffer}")

    def discount(staleness: Array) -> Array:
        return (1.0 + staleness) ** -options.exponent

    return Arrival(options.buffer, discount if options.staleness == "polynomial" else jnp.ones_like)


METHODS = (
    Method("arrival", "synchronous", SynchronousConfig, synchronous),
    Method(
        "arrival",
        "buffered",
        BufferedConfig,
        buffered,
        needs=frozenset({"start_from_broadcast", "fixed_basis", "factors_together", "whole_at_client"}),
        breaks=frozenset({"in_step"}),
    ),
)
