"""Shannon rate on a share of the band, its inverse, and outage.

With `s = c/b` the rate is `r(b) = b log2(1 + s)`: noise grows with the client's own band, so r rises
towards the ceiling `c / ln 2` and never reaches it. All forms here keep float32 precision at both ends.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

LN2 = math.log(2.0)
_TINY = float(jnp.finfo(jnp.float32).tiny)
_HUGE = float(jnp.finfo(jnp.float32).max)
_MIN_SLACK = 1e-18  # the smallest slack whose square is a normal float32


def log_gap(t: Array) -> Array:
    """`[...]` `k(t) = t - log1p(t)` for t > -1, by its series where the difference would cancel."""
    near = jnp.abs(t) < 0.05
    small = jnp.where(near, t, 0.0)
    tail = jnp.polyval(jnp.array([1 / 8, -1 / 7, 1 / 6, -1 / 5, 1 / 4, -1 / 3, 1 / 2]), small)
    large = jnp.where(near, 1.0, t)
    return jnp.where(near, small * small * tail, large - jnp.log1p(large))


def spectral_efficiency(load: Array, slack: Array) -> Array:
    """Spectral efficiency at which a link carries the share `load` of its ceiling.

    Solves `k(x) = k(-slack)` for x > 0, the efficiency being `x + slack = log1p(c/b)`: Halley's iteration, twice.

    Args:
      load: `[...]` rate over ceiling, `R ln2 / c`, in (0, 1).
      slack: `[...]` `1 - load`, in (0, 1): apart, for near the ceiling load alone has lost it.

    Returns:
      `[...]` nat/s/Hz, so that the bandwidth is `R ln2 / efficiency`.
    """
    load, slack = jnp.maximum(load, _TINY), jnp.maximum(slack, _MIN_SLACK)
    mostly_idle = slack > 0.5
    gap = log_gap(-jnp.where(mostly_idle, 0.5, slack))
    target = jnp.where(mostly_idle, -slack - jnp.log(load), gap)
    x = jnp.sqrt(2.0 * target) + 2.0 * target / 3.0
    for _ in range(2):
        miss = log_gap(x) - target
        x = x - 2.0 * miss * x * (1.0 + x) / (2.0 * x * x - miss)
    return x + slack


def marginal_rates(bandwidth_hz: Array, snr_hz: Array) -> tuple[Array, Array]:
    """Partial derivatives of the rate by bandwidth and by snr_hz, `[...]` each; bandwidth_hz > 0.

    `dr/db = (log1p(s) - s/(1+s)) / ln2` is written `k(-s/(1+s)) / ln2`, which does not cancel at small s.
    """
    share = snr_hz / (bandwidth_hz + snr_hz)
    strong = share > 0.5
    weak_gap = log_gap(-jnp.where(strong, 0.5, share))
    strong_gap = jnp.where(strong, _efficiency(bandwidth_hz, snr_hz), 1.0) - share
    return jnp.where(strong, strong_gap, weak_gap) / LN2, bandwidth_hz / (bandwidth_hz + snr_hz) / LN2


def uplink_rate(bandwidth_hz: ArrayLike, snr_hz: ArrayLike) -> Array:
    """Shannon rate of an FDMA uplink.

    Args:
      bandwidth_hz: `[...]` bandwidth given to the client, Hz, >= 0.
      snr_hz: `[...]` received power over noise density p·g/N0, Hz, >= 0.

    Returns:
      `[...]` rate, bit/s; 0, with gradient 0, where the bandwidth is 0.
    """
    return _uplink_rate(*_broadcast(bandwidth_hz, snr_hz))


@jax.custom_jvp
def _uplink_rate(bandwidth_hz: Array, snr_hz: Array) -> Array:
    used = bandwidth_hz > 0
    safe_hz = jnp.where(used, bandwidth_hz, 1.0)
    return jnp.where(used, safe_hz * _efficiency(safe_hz, snr_hz) / LN2, 0.0)


@_uplink_rate.defjvp
def _uplink_rate_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    bandwidth_hz, snr_hz = primals
    used = bandwidth_hz > 0
    by_bandwidth, by_snr = marginal_rates(jnp.where(used, bandwidth_hz, 1.0), snr_hz)
    tangent = by_bandwidth * tangents[0] + by_snr * tangents[1]
    return _uplink_rate(*primals), jnp.where(used, tangent, 0.0)


def required_bandwidth(rate_bps: ArrayLike, snr_hz: ArrayLike) -> Array:
    """The bandwidth that carries a rate: the inverse of `uplink_rate`.

    Args:
      rate_bps: `[...]` rate, bit/s, >= 0.
      snr_hz: `[...]` received power over noise density p·g/N0, Hz, >= 0.

    Returns:
      `[...]` bandwidth, Hz; 0 for rate 0, and inf where the rate is at or above the ceiling `snr_hz / ln 2`.
      The gradient is 0 in both cases.
    """
    return _required_bandwidth(*_broadcast(rate_bps, snr_hz))


@jax.custom_jvp
def _required_bandwidth(rate_bps: Array, snr_hz: Array) -> Array:
    rate_nats = rate_bps * LN2
    solvable = (rate_nats > 0) & (rate_nats < snr_hz)
    nats, ceiling = jnp.where(solvable, rate_nats, 1.0), jnp.where(solvable, snr_hz, 2.0)
    bandwidth_hz = nats / spectral_efficiency(nats / ceiling, (ceiling - nats) / ceiling)
    return jnp.where(solvable, bandwidth_hz, jnp.where(rate_nats > 0, jnp.inf, 0.0))


@_required_bandwidth.defjvp
def _required_bandwidth_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    bandwidth_hz = _required_bandwidth(*primals)
    solved = (bandwidth_hz > 0) & jnp.isfinite(bandwidth_hz)
    by_bandwidth, by_snr = marginal_rates(jnp.where(solved, bandwidth_hz, 1.0), jnp.where(solved, primals[1], 1.0))
    tangent = (tangents[0] - by_snr * tangents[1]) / jnp.maximum(by_bandwidth, _TINY)
    return bandwidth_hz, jnp.where(solved, tangent, 0.0)


def rayleigh_outage(rate_bps: ArrayLike, bandwidth_hz: ArrayLike, mean_snr_hz: ArrayLike) -> Array:
    """Probability that Rayleigh fading cannot carry a rate on a bandwidth.

    Args:
      rate_bps: `[...]` rate, bit/s, >= 0.
      bandwidth_hz: `[...]` bandwidth, Hz, >= 0.
      mean_snr_hz: `[...]` p·E[g]/N0, Hz, >= 0.

    Returns:
      `[...]` `1 - exp(-(2^(R/b) - 1) b / c_mean)`; 0 for rate 0, else 1 without bandwidth or gain.
    """
    rate_bps, bandwidth_hz, mean_snr_hz = _broadcast(rate_bps, bandwidth_hz, mean_snr_hz)
    possible = (bandwidth_hz > 0) & (mean_snr_hz > 0)
    band, mean = jnp.where(possible, bandwidth_hz, 1.0), jnp.where(possible, mean_snr_hz, 1.0)
    outage = -jnp.expm1(-jnp.expm1(rate_bps * LN2 / band) * band / mean)
    return jnp.where(rate_bps > 0, jnp.where(possible, outage, 1.0), 0.0)


def _efficiency(bandwidth_hz: Array, snr_hz: Array) -> Array:
    """`[...]` nat/s/Hz, `log1p(c/b)`; b > 0, however small."""
    return jnp.log1p(jnp.minimum(snr_hz / bandwidth_hz, _HUGE))


def _broadcast(*values: ArrayLike) -> list[Array]:
    return jnp.broadcast_arrays(*(jnp.asarray(value, jnp.float32) for value in values))
