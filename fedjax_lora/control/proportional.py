"""Proportional control: shares of the band by need, and on each the most that meets the latency budget."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from fedjax_lora.control import common
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Decision, Observation
from fedjax_lora.wireless.rate import uplink_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalConfig(common.Budgeted):
    """Shares in proportion to need; each client keeps the most that fits the budget on its share, else the least.

    A client's need is the most that it may send over its spectral efficiency at the equal split (our choice).
    """

    name: Literal["proportional"] = "proportional"


def make(options: ProportionalConfig, context: Context) -> Controller:
    """The queue follows the same law as TSFA's, but decides nothing."""
    del context

    def allocate(queues: common.Queues, observation: Observation) -> Decision:
        del queues
        radio, rank, bits = observation.radio, observation.rank, observation.bits
        heard = common.able(observation)
        least, most = common.rank_limits(options.min_keep_ratio, options.max_keep_ratio, rank)
        equal_bps = uplink_rate(radio.band_hz / jnp.maximum(heard.sum(), 1), radio.snr_hz)
        need = jnp.where(
            heard & (equal_bps > 0), common.at_rank(bits, most) / jnp.where(equal_bps > 0, equal_bps, 1.0), 0.0
        )
        total = need.sum()
        share_hz = radio.band_hz * need / jnp.where(total > 0, total, 1.0)
        rate_bps = uplink_rate(share_hz, radio.snr_hz)
        upload_s = bits / jnp.where(rate_bps > 0, rate_bps, 1.0)[:, None]
        end_s = radio.start_s[:, None] + upload_s
        fitting = jnp.sum(end_s[:, 1:] <= options.latency_budget_s, -1)
        kept = jnp.clip(fitting, least, most)
        ends = jnp.where(heard & (rate_bps > 0), common.at_rank(end_s, kept), 0.0)
        return Decision(kept, share_hz, jnp.max(ends, initial=0.0))

    return Controller(allocate, common.empty_queue, common.latency_queue(options.latency_budget_s))


METHOD = Method("control", "proportional", ProportionalConfig, make, needs=frozenset({"side_by_side", "in_step"}))
