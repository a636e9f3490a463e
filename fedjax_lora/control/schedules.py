"""Cohorts by a rule: in turn, or by the channel. The yardsticks of Lyapunov scheduling.

The clients of the round are `clients.per_round` of all; the band is shared for the least latency. All in every round,
and a uniform sample, are `fixed` with all clients or fewer; a sample on equal parts of the band is `uniform`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.control import common
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Population
from fedjax_lora.core.numbers import traced
from fedjax_lora.wireless.rate import uplink_rate

Priorities = Callable[[Any, Population], tuple[Array, Any]]
"""`(state, clients [K]) -> (priority [K], state)`, of who can be heard."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobinConfig(common.CommonRatio):
    """The clients in turn, by their number."""

    name: Literal["round_robin"] = "round_robin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestChannelConfig(common.CommonRatio):
    """Those that are heard best in the round."""

    name: Literal["best_channel"] = "best_channel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalFairConfig(common.CommonRatio):
    """Those of the largest rate over the mean rate that they were served with.

    memory: rounds over which that mean goes, exponentially (Our choice).
    """

    name: Literal["proportional_fair"] = "proportional_fair"
    memory: float = traced(10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.memory <= 1e6:
            raise ValueError(f"memory must be between 1 and 1e6, got {self.memory!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinLatencyConfig(common.CommonRatio):
    """Those that would end first on an equal part of the band (Our choice)."""

    name: Literal["min_latency"] = "min_latency"


def round_robin(options: RoundRobinConfig, context: Context) -> Controller:
    """The next `clients.per_round` of a circle; who cannot be heard loses the turn."""
    number, most = context.num_clients, context.cohort_size

    def priorities(turn: Array, clients: Population) -> tuple[Array, Array]:
        place = jnp.mod(clients.ids - turn.astype(jnp.int32), number)
        return jnp.where(place < most, -place.astype(jnp.float32), -jnp.inf), jnp.mod(turn + most, number)

    return _scheduled(options, priorities, lambda: jnp.zeros(()))


def best_channel(options: BestChannelConfig, context: Context) -> Controller:
    """By received power over noise density."""
    del context
    return _scheduled(options, lambda state, clients: (clients.radio.snr_hz, state), tuple)


def proportional_fair(options: ProportionalFairConfig, context: Context) -> Controller:
    """By the rate on an equal part of the band, over its mean."""
    number, most = context.num_clients, context.cohort_size

    def priorities(served_bps: Array, clients: Population) -> tuple[Array, Array]:
        rate_bps = uplink_rate(clients.radio.band_hz / most, clients.radio.snr_hz)
        priority = rate_bps / jnp.maximum(served_bps, 1e-3)
        chosen = jnp.zeros(number).at[lax.top_k(priority, most)[1]].set(1.0)
        return priority, served_bps + (chosen * rate_bps - served_bps) / options.memory

    return _scheduled(options, priorities, lambda: jnp.zeros(number))


def min_latency(options: MinLatencyConfig, context: Context) -> Controller:
    """By when a client would end."""
    most = context.cohort_size

    def priorities(state: Any, clients: Population) -> tuple[Array, Any]:
        demand = common.demand_of(clients, options.keep_ratio)
        rate_bps = uplink_rate(clients.radio.band_hz / most, demand.snr_hz)
        upload_s = demand.bits[:, 0] / jnp.where(rate_bps > 0, rate_bps, 1.0)
        return -(demand.start_s[:, 0] + most * demand.shared_s + upload_s), state

    return _scheduled(options, priorities, tuple)


def _scheduled(options: common.CommonRatio, priorities: Priorities, init: Callable[[], Any]) -> Controller:
    """`fixed` control of those of the highest priorities."""

    def schedule(state: Any, key: Array, clients: Population) -> tuple[Array, Any]:
        del key
        priority, state = priorities(state, clients)
        return jnp.where(clients.radio.snr_hz > 0, priority, -jnp.inf), state

    return Controller(common.at_least_latency(options.keep_ratio), init, schedule=schedule)


_IN_STEP = frozenset({"in_step"})  # a cohort is chosen for a round

METHODS = (
    Method("control", "round_robin", RoundRobinConfig, round_robin, needs=_IN_STEP),
    Method("control", "best_channel", BestChannelConfig, best_channel, needs=_IN_STEP),
    Method("control", "proportional_fair", ProportionalFairConfig, proportional_fair, needs=_IN_STEP),
    Method("control", "min_latency", MinLatencyConfig, min_latency, needs=_IN_STEP | {"side_by_side"}),
)
