"""What computing and sending cost a client."""

import jax.numpy as jnp
from jax import Array


def compute_energy_j(cycles: Array, cpu_hz: Array, capacitance: Array | float) -> Array:
    """`[C]` joules of `cycles` `[C]` at frequency `cpu_hz`: `capacitance · cycles · cpu_hz^2`."""
    return capacitance * cycles * jnp.square(cpu_hz)


def transmit_energy_j(power_w: Array | float, upload_s: Array) -> Array:
    """`[C]` joules of sending for `upload_s`; 0 where that is inf, since such a client never sends."""
    return power_w * jnp.where(jnp.isfinite(upload_s), upload_s, 0.0)
