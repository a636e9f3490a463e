"""What a round is made of, and what its steps hand on to one another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fedjax_lora.core.methods import Aggregator, Controller, Decision, Delivery, Drift, Link, Live, Sent, Sparsifier
from fedjax_lora.core.types import Adapters, Base, Dataset, FedState, LinkState, Scope
from fedjax_lora.training.local import Client, Train, Trained
from fedjax_lora.training.optimizers import Optimizer


@struct.dataclass
class World:
    """What no round changes: an argument of the program, so that it is never baked in as a constant."""

    base: Base
    data: Dataset


class Parts(NamedTuple):
    """The functions a round is made of.

    train: local training of one client. optimizer: the server's.
    drift_bits: `scope -> uint32` bits of the drift correction of one client, on the uplink and on the downlink.
    receives: `round -> Live` that the clients are sent.
    extra_downlink_bits: `rank -> uint32` bits of each broadcast but the first, for what the aggregator has merged.
    current_base: `(world, state) -> base`: the frozen weights with all that was merged into them.
    client_weight: examples `[C]` -> weights `[C]` in the average, not yet normalised.
    samples: examples `[C]` that clients hold -> examples `[C]` that they compute in a round.
    one_rank: whether all clients have the structural rank, in every round.
    cohort_size: C, clients a round. chunk: clients trained at once on each device.
    """

    train: Train
    sparsifier: Sparsifier
    drift: Drift
    drift_bits: Callable[[Scope], Array]
    aggregator: Aggregator
    receives: Callable[[Array], Live]
    extra_downlink_bits: Callable[[ArrayLike], Array]
    current_base: Callable[[World, FedState], Base]
    controller: Controller
    link: Link
    optimizer: Optimizer
    client_weight: Callable[[Array], Array]
    samples: Callable[[Array], Array]
    one_rank: bool
    cohort_size: int
    chunk: int
    mesh: Mesh


class Cohort(NamedTuple):
    """Who takes part in a round, and with what.

    ids: `[C]`. present: `[C]` bool, False for padding. link: their part of the radio world.
    clients: what they train on, with leaves `[C, ...]`.
    ranks: `[C, R]` masks of their ranks in use. sends: the parts of the adapters that all of them send.
    start: the adapters that are broadcast to them. downlink_bits: `[C]` uint32.
    samples: `[C]` examples that they compute. start_s: `[C]` seconds at which they can begin their upload.
    """

    ids: Array
    present: Array
    link: LinkState
    clients: Client
    ranks: Array
    sends: Live
    start: Adapters
    downlink_bits: Array
    samples: Array
    start_s: Array

    def scope(self, ranks: Array) -> Scope:
        """What a client with the ranks `[R]` sends."""
        return scope_of(ranks, self.sends)


def scope_of(ranks: Array, sends: Live) -> Scope:
    """The parts `sends` of the ranks `[R]`."""
    return Scope(ranks, *map(jnp.float32, sends))


class Local(NamedTuple):
    """What local training leaves; leaves are `[C, ...]`.

    trained: with the broadcast as the adapters of who is not active.
    shown: of the adapters what is sent, within the broadcast.
    finite: bool, whether a client did not diverge, see `trees.fits_float32`. active: bool, finite and present.
    weight: in the average, not yet normalised.
    """

    trained: Trained
    shown: Adapters
    finite: Array
    active: Array
    weight: Array


class Uplink(NamedTuple):
    """How the uploads were planned and how they went; leaves are `[C, ...]`, but for the round's `latency_s`.

    memory: of the sparsifier, for those who were heard. arrived: bool, who enters the average.
    """

    decision: Decision
    sent: Sent
    memory: Any
    delivery: Delivery
    arrived: Array
    latency_s: Array
