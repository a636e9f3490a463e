"""One share of the ranks for everybody, and shares of the band that make the round as short as can be."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lora.control import common
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Decision, Observation
from fedjax_lora.wireless.allocation import min_max_latency


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedConfig(common.CommonRatio):
    """Shares of the band by `wireless.min_max_latency`, at one keep ratio for all."""

    name: Literal["fixed"] = "fixed"


def make(options: FixedConfig, context: Context) -> Controller:
    """Shares of least latency; a client that cannot send gets none, and the others share as if it were absent."""
    del context
    return Controller(allocate=at_least_latency(options.keep_ratio))


def at_least_latency(keep_ratio: ArrayLike) -> Callable[[Any, Observation], Decision]:
    """`Controller.allocate` of one keep ratio for all and shares of least latency."""

    def allocate(state: Any, observation: Observation) -> Decision:
        del state
        radio, kept = observation.radio, common.common_kept(keep_ratio, observation)
        bits = jnp.where(observation.weights > 0, common.bits_at(observation, kept), 0.0)
        return Decision(kept, min_max_latency(bits, radio.snr_hz, radio.start_s, radio.band_hz).bandwidth_hz)

    return allocate


METHOD = Method("control", "fixed", FixedConfig, make)
