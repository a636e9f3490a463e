"""What controllers share: options, what kept ranks cost, shares of least latency, and virtual queues."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.control.solver.device_sets import Demand
from fedjax_lora.core.network import Decision, Observation, Outcome, Population
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.wireless.allocation import Allocation, min_max_latency

WHOLE = 1e-4
"""Ranks: so that float32's `k - 1e-4` ranks are k when they are rounded down."""

Queues = dict[str, Array]
"""Virtual queue -> its length: `queue_s` of the latency, and `energy_queue_j` where energy has a budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonRatio(Options):
    """Options of the controllers that do not choose the keep ratio.

    keep_ratio: share of the ranks that every client keeps, in (0, 1].
    """

    keep_ratio: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Options):
    """Options of the controllers that have a latency budget.

    latency_budget_s: what the latency of a round should be at most.
    min_keep_ratio: the least that a client keeps, rounded up to whole ranks.
    max_keep_ratio: the most, rounded down to whole ranks, but not under the least. Latency alone does not limit the
      bits: a client that the round does not wait for sends more at no cost.
    """

    latency_budget_s: float = traced(2.0)
    min_keep_ratio: float = traced(0.1)
    max_keep_ratio: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.latency_budget_s < math.inf:
            raise ValueError(f"latency_budget_s must be positive and finite, got {self.latency_budget_s!r}")
        if not 0 < self.min_keep_ratio <= 1:
            raise ValueError(f"min_keep_ratio must be in (0, 1], got {self.min_keep_ratio!r}")
        if not self.min_keep_ratio <= self.max_keep_ratio <= 1:
            allowed = f"between min_keep_ratio = {self.min_keep_ratio} and 1"
            raise ValueError(f"max_keep_ratio must be {allowed}, got {self.max_keep_ratio!r}")


def common_kept(keep_ratio: ArrayLike, observation: Observation | Population) -> Array:
    """`[C]` ranks that clients keep at one keep ratio for all."""
    return jnp.asarray(keep_ratio, jnp.float32) * observation.rank


def bits_at(observation: Observation | Population, kept: Array) -> Array:
    """`[C]` bits of a client that keeps `kept` `[C]` ranks.

    Who sends whole ranks rounds down, to 1 at least. Who sends a share of the values pays in proportion between two
    whole ranks, and below 1 as between 1 and 2.
    """
    bits, rank = observation.bits, observation.rank
    whole = at_rank(bits, jnp.clip(jnp.floor(kept + WHOLE), 1.0, rank))
    low = jnp.clip(jnp.floor(kept), 1.0, jnp.maximum(rank - 1.0, 1.0))
    at_low, at_next = at_rank(bits, low), at_rank(bits, jnp.minimum(low + 1.0, rank))
    between = jnp.maximum(at_low + (kept - low) * (at_next - at_low), 0.0)
    return jnp.where(observation.whole_ranks, whole, between)


def at_rank(table: Array, kept: Array) -> Array:
    """`[C]` entries of `[C, R + 1]` at whole ranks `[C]`."""
    return jnp.take_along_axis(table, kept.astype(jnp.int32)[:, None], axis=1)[:, 0]


def rank_limits(min_keep_ratio: ArrayLike, max_keep_ratio: ArrayLike, rank: Array) -> tuple[Array, Array]:
    """`[C]` fewest whole ranks that keep the least ratio, at least 1, and most within the largest, at least these."""
    least = jnp.clip(jnp.ceil(min_keep_ratio * rank - WHOLE), 1.0, rank)
    return least, jnp.clip(jnp.floor(max_keep_ratio * rank + WHOLE), least, rank)


def relative_tail(tail_energy: Array, weights: Array) -> Array:
    """`[C, R + 1]` tail energies over the weighted mean of the whole, all zeros where there is none.

    Weights `[C]` sum to 1.
    """
    # Scaled first: energies of a late round may be subnormal, or their sums too large.
    largest = jnp.max(jnp.where(weights[:, None] > 0, tail_energy, 0.0), initial=0.0)
    scaled = tail_energy / jnp.where(largest > 0, largest, 1.0)
    mean = jnp.sum(weights * jnp.where(weights > 0, scaled[:, 0], 0.0))
    return scaled / jnp.where(mean > 0, mean, 1.0)


def linear_tail(rank: Array, max_rank: int) -> Array:
    """`[..., R + 1]` share of `rank` `[...]` left out when 0 ... R ranks are kept."""
    return jnp.maximum(1.0 - jnp.arange(max_rank + 1) / rank[..., None], 0.0)


def able(observation: Observation) -> Array:
    """`[C]` who takes part and can be heard at all."""
    radio = observation.radio
    return (observation.weights > 0) & (radio.snr_hz > 0) & (radio.start_s < jnp.inf)


def least_latency(observation: Observation, bits: Array) -> Allocation:
    """Shares of least latency for those who take part and can be heard; the others are left out."""
    radio = observation.radio
    sends = able(observation) & (bits < 1e15 * radio.snr_hz)
    return min_max_latency(jnp.where(sends, bits, 0.0), radio.snr_hz, radio.start_s, radio.band_hz)


def equal_split(observation: Observation) -> Array:
    """`[C]` Hz: the same part of the band for every client that takes part and can be heard."""
    heard = able(observation)
    return jnp.where(heard, observation.radio.band_hz / jnp.maximum(heard.sum(), 1), 0.0)


def at_equal_split(keep_ratio: ArrayLike) -> Callable[[Any, Observation], Decision]:
    """`Controller.allocate` of one keep ratio for all and the same part of the band."""

    def allocate(state: Any, observation: Observation) -> Decision:
        del state
        return Decision(common_kept(keep_ratio, observation), equal_split(observation))

    return allocate


def at_least_latency(keep_ratio: ArrayLike) -> Callable[[Any, Observation], Decision]:
    """`Controller.allocate` of one keep ratio for all and shares of least latency."""

    def allocate(state: Any, observation: Observation) -> Decision:
        del state
        radio, kept = observation.radio, common_kept(keep_ratio, observation)
        bits = jnp.where(observation.weights > 0, bits_at(observation, kept), 0.0)
        return Decision(kept, min_max_latency(bits, radio.snr_hz, radio.start_s, radio.band_hz).bandwidth_hz)

    return allocate


def demand_of(clients: Population, keep_ratio: ArrayLike) -> Demand:
    """What the devices would send in the round at one keep ratio for all."""
    radio, kept = clients.radio, common_kept(keep_ratio, clients)
    return Demand(
        start_s=radio.start_s[:, None],
        shared_s=jnp.zeros_like(radio.start_s) if radio.shared_s is None else radio.shared_s,
        bits=bits_at(clients, kept)[:, None],
        snr_hz=radio.snr_hz,
        able=radio.snr_hz > 0,
    )


def lengthen(queue: Array, spent: Array, budget: ArrayLike) -> Array:
    """`max(queue + spent - budget, 0)`: the mean spent exceeds the budget by at most `(Q_T - Q_0) / T`.

    Of latency or of energy, each in its unit.
    """
    return jnp.maximum(queue + spent - budget, 0.0)


def latency_queue(latency_budget_s: ArrayLike) -> Callable[[Queues, Outcome], tuple[Queues, Queues]]:
    """`Controller.update` of a queue of the latency."""

    def update(queues: Queues, outcome: Outcome) -> tuple[Queues, Queues]:
        queues = queues | {"queue_s": lengthen(queues["queue_s"], outcome.latency_s, latency_budget_s)}
        return queues, queues

    return update


def empty_queue() -> Queues:
    """`Controller.init` of a queue of the latency that begins at 0."""
    return {"queue_s": jnp.zeros(())}
