"""Controllers that meet the latency budget in every round, as far as they can, and never look beyond it."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp

from fedjax_lora.control import common as planning
from fedjax_lora.core.methods import Controller, Decision, Observation
from fedjax_lora.core.numbers import Options
from fedjax_lora.wireless.rate import required_bandwidth, uplink_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Options):
    """What controllers with a budget share, TSFA's too.

    latency_budget_s: what the latency of every round should be at most, or of TSFA's on average.
    min_keep_ratio: the least that a client keeps, rounded up to whole ranks.
    max_keep_ratio: the most, rounded down to whole ranks, but not under the least. Latency alone does not limit the
      bits: a client that the round does not wait for sends more at no cost.
    """

    keep_ratio: ClassVar[float] = 1.0
    latency_budget_s: float = 2.0
    min_keep_ratio: float = 0.1
    max_keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.latency_budget_s < math.inf:
            raise ValueError(f"latency_budget_s must be positive and finite, got {self.latency_budget_s!r}")
        if not 0 < self.min_keep_ratio <= 1:
            raise ValueError(f"min_keep_ratio must be in (0, 1], got {self.min_keep_ratio!r}")
        if not self.min_keep_ratio <= self.max_keep_ratio <= 1:
            allowed = f"between min_keep_ratio = {self.min_keep_ratio} and 1"
            raise ValueError(f"max_keep_ratio must be {allowed}, got {self.max_keep_ratio!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyConfig(Budgeted):
    """The largest common keep ratio that fits the budget, else the smallest; shares of least latency."""

    name: Literal["greedy"] = "greedy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalConfig(Budgeted):
    """Shares in proportion to need; each client keeps the most that fits the budget on its share, else the least.

    A client's need is the most that it may send over its spectral efficiency at the equal split (our choice).
    """

    name: Literal["proportional"] = "proportional"


def greedy(config: GreedyConfig) -> Controller:
    """The queue follows the same law as TSFA's, but decides nothing."""

    def decide(observation: Observation) -> Decision:
        rank, bits, heard = observation.rank, planning.payloads(observation), planning.able(observation)
        least, most = planning.rank_limits(config.min_keep_ratio, config.max_keep_ratio, rank)
        num_ranks = bits.shape[-1] - 1
        # Whole ranks of the largest client; the others keep as large a share of theirs, rounded down.
        ratios = jnp.arange(1, num_ranks + 1)[:, None] / jnp.max(rank, initial=1.0)
        kept = jnp.clip(jnp.floor(ratios * rank + 1e-4), least, most).astype(jnp.int32)
        candidates = jnp.take_along_axis(bits, kept.T, axis=1).T
        upload_s = config.latency_budget_s - observation.start_s
        rate_bps = jnp.where(upload_s > 0, candidates / jnp.where(upload_s > 0, upload_s, 1.0), jnp.inf)
        needed_hz = jnp.where(heard, required_bandwidth(jnp.where(heard, rate_bps, 0.0), observation.snr_hz), 0.0)
        # Payloads do not fall along the candidates: those that fit come first.
        fitting = jnp.sum(needed_hz.sum(-1) <= observation.bandwidth_hz)
        chosen = kept[jnp.maximum(fitting - 1, 0)]
        allocation = planning.allocate(observation, planning.at_rank(bits, chosen))
        return Decision(chosen / rank, allocation.bandwidth_hz, allocation.latency_s)

    return Controller(decide=decide, update_queue=planning.queue_law(config.latency_budget_s))


def proportional(config: ProportionalConfig) -> Controller:
    """The queue follows the same law as TSFA's, but decides nothing."""

    def decide(observation: Observation) -> Decision:
        rank, bits, heard = observation.rank, planning.payloads(observation), planning.able(observation)
        least, most = planning.rank_limits(config.min_keep_ratio, config.max_keep_ratio, rank)
        equal_hz = observation.bandwidth_hz / jnp.maximum(heard.sum(), 1)
        equal_bps = uplink_rate(equal_hz, observation.snr_hz)
        need = jnp.where(
            heard & (equal_bps > 0), planning.at_rank(bits, most) / jnp.where(equal_bps > 0, equal_bps, 1.0), 0.0
        )
        total = need.sum()
        share_hz = observation.bandwidth_hz * need / jnp.where(total > 0, total, 1.0)
        rate_bps = uplink_rate(share_hz, observation.snr_hz)
        upload_s = bits / jnp.where(rate_bps > 0, rate_bps, 1.0)[:, None]
        end_s = observation.start_s[:, None] + upload_s
        fitting = jnp.sum(end_s[:, 1:] <= config.latency_budget_s, -1)
        kept = jnp.clip(fitting, least, most)
        ends = jnp.where(heard & (rate_bps > 0), planning.at_rank(end_s, kept), 0.0)
        return Decision(kept / rank, share_hz, jnp.max(ends, initial=0.0))

    return Controller(decide=decide, update_queue=planning.queue_law(config.latency_budget_s))
