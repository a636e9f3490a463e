"""How long computing and sending take."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.wireless.rate import uplink_rate


def compute_time_s(cycles: Array, cpu_hz: Array) -> Array:
    """`[C]` seconds that `cycles` `[C]` processor cycles take."""
    return cycles / cpu_hz


def transfer_time_s(bits: ArrayLike, rate_bps: Array) -> Array:
    """`[...]` seconds to send bits: 0 for no bits at any rate, inf for some bits at rate 0."""
    bits = jnp.asarray(bits, jnp.float32)
    time_s = bits / jnp.where(rate_bps > 0, rate_bps, 1.0)
    return jnp.where(bits > 0, jnp.where(rate_bps > 0, time_s, jnp.inf), 0.0)


def broadcast_time_s(bits: ArrayLike, bandwidth_hz: ArrayLike, snr_hz: Array, present: Array) -> Array:
    """Seconds to send the same bits to all present clients, at the rate of the worst of them on the whole band.

    bits: scalar or `[C]`; snr_hz: `[C]` of the server's transmitter; present: `[C]`, 0 for an absent client.
    Returns the shape of bits; 0 for an empty cohort.
    """
    worst_bps = jnp.min(uplink_rate(bandwidth_hz, snr_hz), initial=jnp.inf, where=present > 0)
    return transfer_time_s(bits, worst_bps)
