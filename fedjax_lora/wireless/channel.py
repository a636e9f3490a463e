"""Power gain of one client's channel: path loss, shadowing and small-scale fading. All numbers may be traced."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.units import db_to_linear

PathLoss = Literal["3gpp128", "umi", "uma"]
FadingKind = Literal["none", "rayleigh", "rician"]

_USER_HEIGHT_M = 1.5
_ENVIRONMENT_HEIGHT_M = 1.0
_LIGHT_M_PER_S = 299_792_458.0  # TR 38.901 rounds it to 3e8, which moves loss beyond the breakpoint by 6e-3 dB


class _Street(NamedTuple):
    """Constants of one scenario of 3GPP TR 38.901, table 7.4.1-1 and 7.4.2-1.

    los: intercept, slope a decade before the breakpoint, weight of the breakpoint term.
    nlos: intercept, slope a decade, frequency slope a decade.
    los_decay_m: decay of the line-of-sight probability.
    """

    base_height_m: float
    los: tuple[float, float, float]
    nlos: tuple[float, float, float]
    los_decay_m: float


_STREETS = {
    "umi": _Street(10.0, los=(32.4, 21.0, 9.5), nlos=(22.4, 35.3, 21.3), los_decay_m=36.0),
    "uma": _Street(25.0, los=(28.0, 22.0, 9.0), nlos=(13.54, 39.08, 20.0), los_decay_m=63.0),
}


def los_probability(model: Literal["umi", "uma"], distance_m: Array) -> Array:
    """`[...]` probability of line of sight at a ground distance, users at 1.5 m (TR 38.901, table 7.4.2-1)."""
    near = jnp.minimum(18.0 / distance_m, 1.0)
    return near + jnp.exp(-distance_m / _STREETS[model].los_decay_m) * (1.0 - near)


def path_loss_db(model: PathLoss, distance_m: Array, carrier_ghz: Array | float, line_of_sight: Array) -> Array:
    """`[...]` path loss at a ground distance, dB, users at 1.5 m.

    `3gpp128` is `128.1 + 37.6 log10(d_km)`, whatever the carrier and the sight. `umi` (base at 10 m) and `uma`
    (base at 25 m) are TR 38.901, table 7.4.1-1, with `line_of_sight: [...]` bool choosing the branch.
    """
    if model == "3gpp128":
        return 128.1 + 37.6 * jnp.log10(distance_m / 1e3)
    street = _STREETS[model]
    height_m = street.base_height_m - _USER_HEIGHT_M
    slant_m = jnp.hypot(distance_m, height_m)
    breakpoint_m = (
        4.0
        * (street.base_height_m - _ENVIRONMENT_HEIGHT_M)
        * (_USER_HEIGHT_M - _ENVIRONMENT_HEIGHT_M)
        * (carrier_ghz * (1e9 / _LIGHT_M_PER_S))
    )
    decades, carrier_decades = jnp.log10(slant_m), jnp.log10(carrier_ghz)
    intercept, slope, weight = street.los
    before = intercept + slope * decades + 20.0 * carrier_decades
    bend_db = weight * jnp.log10(breakpoint_m**2 + height_m**2)
    after = intercept + 40.0 * decades + 20.0 * carrier_decades - bend_db
    los_db = jnp.where(distance_m <= breakpoint_m, before, after)
    intercept, slope, carrier_slope = street.nlos
    nlos_db = jnp.maximum(los_db, intercept + slope * decades + carrier_slope * carrier_decades)
    return jnp.where(line_of_sight, los_db, nlos_db)


def draw_mean_gain(
    key: Array, model: PathLoss, distance_m: Array, carrier_ghz: Array | float, shadowing_db: Array | float
) -> Array:
    """Scalar power gain of path loss and log-normal shadowing; the line of sight is drawn too."""
    sight_key, shadow_key = jax.random.split(key)
    if model == "3gpp128":
        line_of_sight = jnp.bool_(True)
    else:
        line_of_sight = jax.random.bernoulli(sight_key, los_probability(model, distance_m))
    loss_db = path_loss_db(model, distance_m, carrier_ghz, line_of_sight)
    return db_to_linear(shadowing_db * jax.random.normal(shadow_key) - loss_db)


class FadingLaw(NamedTuple):
    """Amplitudes of a coefficient `h = steady + scatter * CN(0, 1)`; their squares sum to 1.

    steady: the part along the line of sight.
    scatter: the Rayleigh part.
    """

    steady: Array | float
    scatter: Array | float


def fading_law(kind: FadingKind, rician_k_db: Array | float) -> FadingLaw:
    """Amplitudes of a kind of fading; `rician_k_db`, the steady over the scattered power, is Rician's alone."""
    if kind == "none":
        return FadingLaw(1.0, 0.0)
    if kind == "rayleigh":
        return FadingLaw(0.0, 1.0)
    ratio = db_to_linear(jnp.asarray(rician_k_db, jnp.float32))
    return FadingLaw(jnp.sqrt(ratio / (1.0 + ratio)), jnp.sqrt(1.0 / (1.0 + ratio)))


def draw_fading(key: Array, law: FadingLaw) -> Array:
    """Complex64 scalar coefficient h with E|h|^2 = 1."""
    return law.steady + law.scatter * jax.random.normal(key, dtype=jnp.complex64)


def step_fading(key: Array, fading: Array, law: FadingLaw, correlation: Array | float) -> Array:
    """The next round's coefficient: AR(1) in the scattered part, so that the steady part stays and E|h|^2 = 1."""
    fresh = draw_fading(key, law) - law.steady
    # 1 - correlation^2 as a product: near 1 the square's rounding would be most of the difference.
    innovation = jnp.sqrt((1.0 - correlation) * (1.0 + correlation))
    return law.steady + correlation * (fading - law.steady) + innovation * fresh


def power(fading: Array) -> Array:
    """`[...]` power gain |h|^2."""
    return jnp.square(fading.real) + jnp.square(fading.imag)


def estimate(key: Array, fading: Array, law: FadingLaw, error: Array | float) -> Array:
    """Complex64 scalar estimate of a coefficient, of the same law, that misses the share `error` of its scatter.

    With scattered parts g of the coefficient and g' of the estimate, `g = sqrt(1 - error) g' + sqrt(error) w` where w
    is independent of g'. It is drawn the other way round, which is the same joint law.
    """
    fresh = draw_fading(key, law) - law.steady
    return law.steady + jnp.sqrt(1.0 - error) * (fading - law.steady) + jnp.sqrt(error) * fresh


def expected_power(estimate: Array, law: FadingLaw, error: Array | float) -> Array:
    """`[...]` mean of |h|^2 given the estimate: `|steady + sqrt(1 - error) g'|^2 + error scatter^2`."""
    known = law.steady + jnp.sqrt(1.0 - error) * (estimate - law.steady)
    return power(known) + error * law.scatter**2
