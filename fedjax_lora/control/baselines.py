"""Controllers that do not choose the keep ratio: all take it from `Hyper.keep_ratio`, which a sweep can vary."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.control import common as planning
from fedjax_lora.core.methods import Controller, Decision, Observation
from fedjax_lora.core.numbers import Options
from fedjax_lora.wireless.allocation import min_max_latency


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonRatio(Options):
    """What these controllers share.

    keep_ratio: share of the ranks to keep, in (0, 1]; the starting value of `Hyper.keep_ratio`.
    """

    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdealConfig(CommonRatio):
    """No network at all; goes with `wireless.perfect_link`."""

    name: Literal["ideal"] = "ideal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformConfig(CommonRatio):
    """The same bandwidth for every client that is present and can be heard."""

    name: Literal["uniform"] = "uniform"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedConfig(CommonRatio):
    """Bandwidth by `min_max_latency`, at one keep ratio for all."""

    name: Literal["fixed"] = "fixed"


def ideal(config: IdealConfig) -> Controller:
    """Equal shares, which a perfect link ignores."""
    del config
    return Controller(decide=_equal_shares, update_queue=_keep_queue)


def uniform(config: UniformConfig) -> Controller:
    """Equal shares of the band for the clients that are present and can be heard."""
    del config
    return Controller(decide=_equal_shares, update_queue=_keep_queue)


def fixed(config: FixedConfig) -> Controller:
    """Shares of least latency; a client that cannot send gets none, and the others share as if it were absent."""
    del config

    def decide(observation: Observation) -> Decision:
        keep_ratio = _common_ratio(observation)
        bits = jnp.where(observation.weights > 0, observation.payload_bits(keep_ratio), 0.0)
        allocation = min_max_latency(bits, observation.snr_hz, observation.start_s, observation.bandwidth_hz)
        return Decision(keep_ratio, allocation.bandwidth_hz)

    return Controller(decide=decide, update_queue=_keep_queue)


def _equal_shares(observation: Observation) -> Decision:
    heard = planning.able(observation)
    share_hz = observation.bandwidth_hz / jnp.maximum(heard.sum(), 1)
    return Decision(_common_ratio(observation), jnp.where(heard, share_hz, 0.0))


def _common_ratio(observation: Observation) -> Array:
    return jnp.full_like(observation.weights, observation.hyper.keep_ratio)


def _keep_queue(queue_s: Array, latency_s: Array) -> Array:
    """These controllers hold no latency constraint, so their queue stays as it is."""
    del latency_s
    return queue_s
