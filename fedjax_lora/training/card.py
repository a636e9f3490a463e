"""Devices train one after another, each with the cut and the server's frequency that suit its channel.

After the idea of "CARD", arXiv 2412.00090. For each device of a round the cut, of 0 ... L - 1 first layers at the
device, and the frequency f of the server minimise

    weight delay / delay_scale_s + (1 - weight) (energy of the server) / energy_scale_j

The form of the objective is ours. The cut is found by enumeration. The server's time is cycles / f and its energy
kappa cycles f^2, so that the best frequency is the same for all cuts and devices,
`f = (weight energy_scale_j / (2 (1 - weight) kappa delay_scale_s))^(1/3)`, clipped to what the server can do.

Embedding and first layers are at the device, the other layers and the head at the server, to which labels are sent. All
crosses in float32, so that a step is that of ordinary federated LoRA at whatever cut; the server holds a copy of its
adapters for each device and averages them. The adapters of the device's layers, both factors in the ranks in use, are
sent to it before the round and back after it, beside activations and gradients.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core import trees
from fedjax_lora.core.count import Count
from fedjax_lora.core.learning import Client, Exchange, Model, Trainer, Work, split_work
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Radio
from fedjax_lora.core.numbers import traced
from fedjax_lora.core.sides import Side, TrainingOptions
from fedjax_lora.core.types import Base
from fedjax_lora.data.batches import gather
from fedjax_lora.training.local import alone, drawn_batches, steps_of, whole_work
from fedjax_lora.training.split import num_labels
from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import uplink_rate

VALUE_BITS = 32
"""Of each value, and of each label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardOptions(TrainingOptions):
    """What delay and energy are worth; every default is our choice.

    weight: of the delay, in [0, 1]; the server's energy has the rest.
    delay_scale_s, energy_scale_j: of a device in a round, by which the two are made comparable.
    server_hz_min, server_hz_max: between which the server's frequency is chosen.
    """

    name: Literal["card"] = "card"
    weight: float = traced(0.5)
    delay_scale_s: float = traced(1.0)
    energy_scale_j: float = traced(1.0)
    server_hz_min: float = traced(1e10)
    server_hz_max: float = traced(1e11)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be between 0 and 1, got {self.weight!r}")
        for name in ("delay_scale_s", "energy_scale_j", "server_hz_min"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not self.server_hz_min <= self.server_hz_max < math.inf:
            raise ValueError(
                f"server_hz_max must be at least server_hz_min = {self.server_hz_min} and finite, "
                f"got {self.server_hz_max!r}"
            )

    def side(self, num_layers: int) -> Side | None:
        """Nothing goes through the sparsifier: what is at a device differs, and is charged by `exchange`."""
        del num_layers
        return Side((), head=False)


def make(options: CardOptions, context: Context) -> Trainer:
    """Training whose cut is chosen by device and round."""
    model: Model = context.made["model"]

    def exchange(base: Base, pool: Mapping[str, Array], client: Client, state: tuple) -> Exchange:
        del state
        rows, weight = drawn_batches(jax.random.split(client.key)[0], client, context.local)
        return _ways(model, context, base, pool, client.rank, rows, weight)

    return Trainer(
        train=alone(steps_of(context, model)),
        work=whole_work(context.local),
        exchange=exchange,
        in_turn=True,
        choose=lambda radio_of, samples, ways: best_way(options, radio_of, samples, ways),
    )


METHOD = Method(
    "training",
    "card",
    CardOptions,
    make,
    needs=frozenset({"everything_sent", "exact_wire", "free_broadcast", "even_ranks"}),
    breaks=frozenset({"whole_at_client", "side_by_side"}),
)


def _ways(
    model: Model, context: Context, base: Base, pool: Mapping[str, Array], rank: Array, rows: Array, weight: Array
) -> Exchange:
    """`[L]` what passes with 0 ... L - 1 layers at the device, in the steps `[E, B]`; real positions alone are sent."""
    assert context.like is not None  # the adapters come before training
    hidden = model.embed(base, gather(pool, rows.ravel()), None)
    positions = jnp.sum(hidden.mask.reshape(*rows.shape, -1), -1)
    tensor = Count.of(jnp.sum(positions * weight).astype(jnp.uint32)) * hidden.values.shape[-1] * VALUE_BITS
    labels = num_labels(context.made["task"], positions, weight) * VALUE_BITS
    widths = sum(f.a.shape[1] + f.b.shape[2] for f in context.like.modules.values())
    at_device = jnp.arange(model.num_layers)
    adapters = Count.of(rank.astype(jnp.uint32)) * widths * VALUE_BITS * at_device
    share = at_device / model.num_layers
    down = tensor * (at_device > 0) + adapters
    return Exchange(tensor + labels + adapters, down, share, 1.0 - share)


def best_way(
    options: CardOptions, radio_of: Callable[[Work], Radio], samples: Array, ways: Exchange
) -> tuple[Work, Exchange]:
    """The work and exchange of each client `[C]` of those `[C, L]`, at the best frequency and cut."""
    number = ways.device_share.shape[-1]

    def way(cut: Array, server_hz: Array) -> tuple[Work, Exchange]:
        own = jax.tree.map(lambda leaf: leaf[:, cut], ways)
        return split_work(samples, own)._replace(server_hz=jnp.broadcast_to(server_hz, samples.shape)), own

    def cost(cut: Array, server_hz: Array) -> Array:
        work, _ = way(cut, server_hz)
        radio = radio_of(work)
        assert work.up_bits is not None and radio.shared_s is not None and radio.server_j is not None
        upload_s = transfer_time_s(work.up_bits, uplink_rate(radio.band_hz, radio.snr_hz))
        delay_s = radio.start_s + radio.shared_s + upload_s
        energy_j = radio.server_j / options.energy_scale_j
        return options.weight * delay_s / options.delay_scale_s + (1 - options.weight) * energy_j

    server_hz = best_frequency(options, radio_of(Work(jnp.zeros_like(samples), *_one_sample(options, samples))))
    costs = jax.vmap(cost, (0, None))(jnp.arange(number), server_hz)
    best = jnp.argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf), 0)
    chosen = jax.vmap(lambda client, cut: trees.take(trees.take(ways, client), cut))(jnp.arange(samples.size), best)
    return split_work(samples, chosen)._replace(server_hz=jnp.broadcast_to(server_hz, samples.shape)), chosen


def _one_sample(options: CardOptions, samples: Array) -> tuple[Array, Array, Array, Array]:
    """Work of the server alone, at its highest frequency: its seconds and joules tell what it draws there."""
    nothing = jnp.zeros_like(samples)
    return jnp.ones_like(samples), nothing, nothing, jnp.full_like(samples, options.server_hz_max)


def best_frequency(options: CardOptions, radio: Radio) -> Array:
    """Hz of the server, given its time and energy for some work at `server_hz_max`: kappa f^3 is joules a second."""
    assert radio.shared_s is not None and radio.server_j is not None
    drawn_w = radio.server_j[0] / radio.shared_s[0]
    worth_w = options.weight * options.energy_scale_j / options.delay_scale_s
    rest = jnp.maximum(2.0 * (1.0 - options.weight), 1e-30)  # where delay alone counts, as fast as can be
    best_hz = options.server_hz_max * jnp.cbrt(worth_w / rest / drawn_w)
    return jnp.clip(best_hz, options.server_hz_min, options.server_hz_max)
