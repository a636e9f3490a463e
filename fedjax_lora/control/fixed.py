"""One share of the ranks for everybody, and shares of the band that make the round as short as can be."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

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

    def allocate(state: Any, observation: Observation) -> Decision:
        del state
        radio, kept = observation.radio, common.common_kept(options.keep_ratio, observation)
        bits = jnp.where(observation.weights > 0, common.bits_at(observation, kept), 0.0)
        return Decision(kept, min_max_latency(bits, radio.snr_hz, radio.start_s, radio.band_hz).bandwidth_hz)

    return Controller(allocate=allocate)


METHOD = Method("control", "fixed", FixedConfig, make)
