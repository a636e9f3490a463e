"""Decibels to SI and back: the only place where dB is undone."""

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


def dbm_to_watt(power_dbm: float) -> float:
    """Watts of a power in dBm."""
    return 1e-3 * db_to_linear(power_dbm)


THERMAL_NOISE_W_PER_HZ = dbm_to_watt(-174.0)
"""Noise density of a receiver at 290 K with noise figure 0 dB."""
