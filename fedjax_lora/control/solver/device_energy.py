"""Which devices take part in a round, and on which parts of the band, where energy is what counts.

A device that sends `bits` on the band b spends `power bits / r(b)` on it, beside what computing takes. For a given set
the shares of least energy are exact: the energy is convex in them, and at the optimum one more hertz saves every device
the same. The set is found by a heuristic. All functions are of arrays alone; the solver is our own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from fedjax_lora.control.solver.device_sets import flip_one
from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import uplink_rate

_HALVINGS = 40
_FLIPS = 3

# With the share in units of the ceiling, x = b / c, a bit takes 1 / (c h(x)) seconds with h(x) = x log2(1 + 1 / x), and
# a hertz more saves h'(x) / (c h(x))^2 of it. The logarithm of h' / h^2 is nearly on a line in that of x.
_LOG_SHARE = np.linspace(-24.0, 20.0, 2048)


def _log_saving(log_share: np.ndarray) -> np.ndarray:
    x = np.exp(log_share)
    return np.log((np.log1p(1 / x) - 1 / (1 + x)) * np.log(2.0)) - 2 * np.log(x * np.log1p(1 / x))


_LOG_SAVING = _log_saving(_LOG_SHARE)


class Costs(NamedTuple):
    """What taking part costs the devices, `[K]`.

    own_j: joules of computing. bits: to send. snr_hz: received power over noise density. able: bool, who may take part.
    """

    own_j: Array
    bits: Array
    snr_hz: Array
    able: Array


class ChosenByEnergy(NamedTuple):
    """A set `[K]` of devices, its shares of the band `[K]`, its energy in joules, and price times it less the gains."""

    mask: Array
    share_hz: Array
    energy_j: Array
    objective: Array


def least_energy(costs: Costs, mask: Array, band_hz: ArrayLike, power_w: ArrayLike) -> tuple[Array, Array]:
    """Joules of the able devices of a set `[K]`, scalar, and their shares `[K]` of the band; 0 and zeros for no device.

    Exact to about 1e-4: the optimum is flat.
    """
    mask = mask & costs.able & (costs.snr_hz > 0)
    sends = mask & (costs.bits > 0)
    # Of a hertz more for each: log(bits / c^2), to which the saving at its share is added.
    scale = jnp.log(jnp.where(sends, costs.bits, 1.0)) - 2 * jnp.log(jnp.where(sends, costs.snr_hz, 1.0))
    equal = jnp.asarray(band_hz, jnp.float32) / jnp.maximum(jnp.sum(sends), 1)
    grid, saving = jnp.asarray(_LOG_SHARE, jnp.float32), jnp.asarray(_LOG_SAVING, jnp.float32)
    log_snr = jnp.log(jnp.where(sends, costs.snr_hz, 1.0))
    at_equal = scale + jnp.interp(jnp.log(equal) - log_snr, grid, saving)

    def shares(log_price: Array) -> Array:
        log_share = jnp.interp(scale - log_price, -saving, grid) + log_snr
        return jnp.where(sends, jnp.exp(log_share), 0.0)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        too_much = jnp.sum(shares(middle)) > band_hz
        return jnp.where(too_much, middle, low), jnp.where(too_much, high, middle)

    low = jnp.min(jnp.where(sends, at_equal, jnp.inf))
    high = jnp.max(jnp.where(sends, at_equal, -jnp.inf))
    low, high = (jnp.where(jnp.isfinite(end), end, 0.0) for end in (low, high))
    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    share_hz = shares(0.5 * (low + high))
    total_hz = jnp.sum(share_hz)
    share_hz = share_hz * (band_hz / jnp.where(total_hz > 0, total_hz, 1.0))
    upload_s = transfer_time_s(jnp.where(sends, costs.bits, 0.0), uplink_rate(share_hz, costs.snr_hz))
    return jnp.sum(jnp.where(mask, costs.own_j + power_w * upload_s, 0.0)), share_hz


def best_by_energy(
    costs: Costs, band_hz: ArrayLike, power_w: ArrayLike, price: ArrayLike, gains: Array, most: int | None = None
) -> ChosenByEnergy:
    """Minimise `price energy - sum of gains` over sets of at most `most` devices and shares of the band: a heuristic.

    For each size the candidates are those whose own price, on an equal part of the band, is least beside their gain.
    The best set then changes by single devices while that helps, a few times. Price and gains `[K]` are >= 0.
    """
    able = costs.able & (costs.snr_hz > 0)
    number, most = jnp.arange(able.size + 1), able.size if most is None else most
    equal_hz = band_hz / jnp.maximum(number, 1)[:, None]
    upload_s = transfer_time_s(costs.bits, uplink_rate(equal_hz, costs.snr_hz))
    worth = jnp.where(able, price * (costs.own_j + power_w * upload_s) - gains, jnp.inf)
    by_worth = (jnp.argsort(jnp.argsort(worth, -1), -1) < number[:, None]) & able

    def evaluate(mask: Array) -> Array:
        energy_j, _ = least_energy(costs, mask, band_hz, power_w)
        objective = price * energy_j - jnp.sum(jnp.where(mask, gains, 0.0))
        return jnp.where(jnp.sum(mask) > most, jnp.inf, objective)

    objectives = jax.vmap(evaluate)(by_worth)
    best = jnp.argmin(objectives)
    first = by_worth[best], objectives[best]
    mask, objective = lax.fori_loop(0, _FLIPS, lambda _, found: flip_one(evaluate, able, *found), first)
    energy_j, share_hz = least_energy(costs, mask, band_hz, power_w)
    return ChosenByEnergy(mask, share_hz, energy_j, objective)
