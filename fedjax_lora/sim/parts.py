"""What a round is made of, and what its steps hand on to one another."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregator, Live, Received, Sparsifier, Transform
from fedjax_lora.core.learning import (
    Adapter,
    Client,
    Correction,
    Exchange,
    Model,
    Optimizer,
    Task,
    Trained,
    Trainer,
    Work,
)
from fedjax_lora.core.mapping import Mapped
from fedjax_lora.core.network import Arrival, Controller, Decision, Delivery, Radio, Wireless
from fedjax_lora.core.numbers import Numbers
from fedjax_lora.core.sides import Side
from fedjax_lora.core.types import Adapters, Base, Dataset, Packing, Scope
from fedjax_lora.sim.cohort import CLIENTS, MODEL, map_in_order, map_over_devices, padded_size, sum_over_devices


@struct.dataclass
class World:
    """What no round changes: an argument of the program, so that it is never baked in as a constant."""

    base: Base
    data: Dataset


class Layout(NamedTuple):
    """How the work of a round is laid out; static.

    cohort_size: C, clients a round. chunk: clients trained at once on each device.
    mesh: the devices, see `cohort.device_mesh`.
    everyone: whether all clients take part in every round, and nobody chooses among them.
    one_rank: whether all clients have the structural rank, in every round.
    packing: of the batches of evaluation; None where nothing is packed.
    in_order: whether clients are worked on, and added, alike on any number of devices.
    all_at_once: whether an average takes all updates of a round, which then are held, and the error norms are measured.
    running: clients that run at once, where they begin and end at times of their own; a cohort is then of those that
      the server takes. None where all of a cohort begin and end together.
    axes: of the frozen weights, see `Model.axes`.
    """

    cohort_size: int
    chunk: int
    mesh: Mesh
    everyone: bool
    one_rank: bool
    packing: Packing | None = None
    in_order: bool = False
    all_at_once: bool = True
    running: int | None = None
    axes: Mapped = Mapped()

    @property
    def cohort_key(self) -> str:
        """The key of the configuration that `cohort_size` is of."""
        return "clients.per_round" if self.running is None else "arrival.buffer"

    @property
    def num_devices(self) -> int:
        """How many share the clients of one run, where such as hold one frozen base together count as one."""
        return self.mesh.shape[CLIENTS]

    @property
    def model_devices(self) -> int:
        """How many hold one frozen base together."""
        return self.mesh.shape[MODEL]

    @property
    def padded_cohort(self) -> int:
        """C rounded up to whole chunks: on every device, or in all where clients are worked on in order."""
        return padded_size(self.cohort_size, self.chunk, 1 if self.in_order else self.num_devices)

    def map(self, work: Callable[..., Any], shared: Any, items: Any, chunk: int, *, of_model: bool = False) -> Any:
        """`cohort.map_over_devices`, or `map_in_order`."""
        if self.in_order:
            return map_in_order(work, shared, items, chunk, self.mesh)
        return map_over_devices(work, shared, items, chunk, self.mesh, of_model=of_model)

    def sum(self, work: Callable[..., Any], shared: Any, items: Any, most: int) -> Any:
        """`cohort.sum_over_devices`."""
        return sum_over_devices(work, shared, items, most, self.mesh)


class Parts(NamedTuple):
    """The records that a round is made of, with the numbers of one run in them.

    transforms: of every message, one after the other. server: its optimizer.
    client_weight: examples `[C]` -> weights `[C]` in the average, not yet normalised.
    rank: structural rank r. scale: s = alpha / r. ranks: `[K]`, the clients' ranks before round 1.
    init_adapters: `key -> Adapters` before round 1.
    side: what of the adapters is at the device and crosses the air; None for all.
    layer_ranks: module name -> `[layers]`, the most components that a layer has, of those that cross the air; `{}`
      where all layers have R. `rank` is the largest of all layers.
    layer_scales: module name -> `[L]`, by what a layer's product is scaled; `{}` where it is by s.
    arrival: when the server steps.
    """

    model: Model
    adapter: Adapter
    task: Task
    trainer: Trainer
    sparsifier: Sparsifier
    transforms: tuple[Transform, ...]
    aggregator: Aggregator
    correction: Correction
    controller: Controller
    wireless: Wireless
    server: Optimizer
    client_weight: Callable[[Array], Array]
    rank: Array
    scale: Array
    ranks: Array
    init_adapters: Callable[[Array], Adapters]
    layout: Layout
    side: Side | None = None
    layer_ranks: Mapping[str, Array] = {}
    layer_scales: Mapping[str, Array] = {}
    arrival: Arrival = Arrival()

    def scope_on_air(self, ranks: Array, live: Live) -> Scope:
        """The parts `live` of the ranks `[R]`, as far as the layers that cross the air have them."""
        return dataclasses.replace(scope_of(ranks, live), layer_ranks=self.layer_ranks)

    def on_air(self, adapters: Adapters) -> Adapters:
        """What of the adapters of one client, or of the server, crosses the air."""
        return adapters if self.side is None else self.side.take(adapters)


MakeParts = Callable[[Numbers], Parts]
"""From the traced numbers of a run to its records; called inside the program."""


class Arrivals(NamedTuple):
    """How the updates of a cohort come in whose clients began at times of their own; leaves are `[C, ...]`.

    places: of `Running`; padding has the number of all places. starts: what each client started from.
    version: the step after which it started. discount: what its change counts. decision: what was decided then.
    waited_s: scalar, seconds since the last step of the server.
    """

    places: Array
    starts: Adapters
    version: Array
    discount: Array
    decision: Decision
    waited_s: Array


class Cohort(NamedTuple):
    """Who takes part in a round, and with what.

    ids: `[C]`. present: `[C]` bool, False for padding. wireless: their part of the network's state.
    clients: what they train on, with leaves `[C, ...]`.
    ranks: `[C, R]` masks of their ranks in use. sends: the parts of the adapters that all of them send.
    start: the adapters that are broadcast to them. downlink: `[C]` bits.
    work: `[C]` of their training. radio: what control knows of the network.
    round: steps of the server before this one.
    controller: its state after it has chosen them. exchange: `[C]` of what passes while they train; None for nothing.
    arrivals: where clients begin and end at times of their own; None where all started from `start`.
    """

    ids: Array
    present: Array
    wireless: Any
    clients: Client
    ranks: Array
    sends: Live
    start: Adapters
    downlink: Count
    work: Work
    radio: Radio
    round: Array
    controller: Any = ()
    exchange: Exchange | None = None
    arrivals: Arrivals | None = None

    def scope(self, ranks: Array) -> Scope:
        """What a client with the ranks `[R]` sends."""
        return scope_of(ranks, self.sends)


def scope_of(ranks: Array, live: Live) -> Scope:
    """The parts `live` of the ranks `[R]`."""
    return Scope(ranks, *map(jnp.float32, live))


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


class Offers(NamedTuple):
    """What control can choose from: tail energy and float32 bits `[C, R + 1]` of 0 ... R kept ranks, see `Offer`."""

    tail_energy: Array
    bits: Array


class Upload(NamedTuple):
    """What the clients send; leaves are `[C, ...]`.

    received: as the server decodes it; None where it is averaged client by client. bits: of all that each sends.
    kept_ranks, dropped_energy: see `Message`. memory: of the sparsifier, for those who are heard.
    """

    received: Received | None
    bits: Count
    kept_ranks: Array
    dropped_energy: Array
    memory: Any


class Uplink(NamedTuple):
    """How the uploads were planned and how they went; leaves are `[C, ...]`, but for the round's `latency_s`.

    arrived: bool, who enters the average.
    """

    decision: Decision
    upload: Upload
    delivery: Delivery
    arrived: Array
    latency_s: Array
