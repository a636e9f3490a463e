"""Greedy control: the largest common keep ratio with which a round meets the latency budget."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from fedjax_lora.control import common
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Decision, Observation
from fedjax_lora.wireless.rate import required_bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyConfig(common.Budgeted):
    """The largest common keep ratio that fits the budget, else the smallest; shares of least latency."""

    name: Literal["greedy"] = "greedy"


def make(options: GreedyConfig, context: Context) -> Controller:
    """The queue follows the same law as TSFA's, but decides nothing."""
    del context

    def allocate(queues: common.Queues, observation: Observation) -> Decision:
        del queues
        radio, rank, bits = observation.radio, observation.rank, observation.bits
        heard = common.able(observation)
        least, most = common.rank_limits(options.min_keep_ratio, options.max_keep_ratio, rank)
        num_ranks = bits.shape[-1] - 1
        # Whole ranks of the largest client; the others keep as large a share of theirs, rounded down.
        ratios = jnp.arange(1, num_ranks + 1)[:, None] / jnp.max(rank, initial=1.0)
        kept = jnp.clip(jnp.floor(ratios * rank + common.WHOLE), least, most)
        candidates = jnp.take_along_axis(bits, kept.T.astype(jnp.int32), axis=1).T
        upload_s = options.latency_budget_s - radio.start_s
        rate_bps = jnp.where(upload_s > 0, candidates / jnp.where(upload_s > 0, upload_s, 1.0), jnp.inf)
        needed_hz = jnp.where(heard, required_bandwidth(jnp.where(heard, rate_bps, 0.0), radio.snr_hz), 0.0)
        # Payloads do not fall along the candidates: those that fit come first.
        fitting = jnp.sum(needed_hz.sum(-1) <= radio.band_hz)
        chosen = kept[jnp.maximum(fitting - 1, 0)]
        allocation = common.least_latency(observation, common.at_rank(bits, chosen))
        return Decision(chosen, allocation.bandwidth_hz, allocation.latency_s)

    return Controller(allocate, common.empty_queue, common.latency_queue(options.latency_budget_s))


METHOD = Method("control", "greedy", GreedyConfig, make, needs=frozenset({"side_by_side", "in_step"}))
