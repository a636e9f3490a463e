"""Decibels to SI and back: the only place where dB is undone. Traced values are taken in float32, floats in double."""

from typing import overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


@overload
def db_to_linear(value_db: float) -> float: ...
@overload
def db_to_linear(value_db: Array) -> Array: ...
def db_to_linear(value_db):
    """Power ratio of a value in dB; a float stays a float."""
    return 10.0 ** (value_db / 10.0)


def linear_to_db(ratio: ArrayLike) -> Array:
    """`[...]` dB of a power ratio; -inf for 0."""
    return 10.0 * jnp.log10(ratio)


@overload
def dbm_to_watt(power_dbm: float) -> float: ...
@overload
def dbm_to_watt(power_dbm: Array) -> Array: ...
def dbm_to_watt(power_dbm):
    """Watts of a power in dBm; a float stays a float."""
    return 1e-3 * db_to_linear(power_dbm)


THERMAL_NOISE_DBM_PER_HZ = -174.0
"""Noise density of a receiver at 290 K with noise figure 0 dB."""

THERMAL_NOISE_W_PER_HZ = dbm_to_watt(THERMAL_NOISE_DBM_PER_HZ)
"""The same in W/Hz: 4e-21, well inside float32's range; divide a power by it before anything else becomes small."""
