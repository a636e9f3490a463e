"""The best response of every client to a latency and a price of the band, and its derivatives."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.wireless.rate import LN2, log_gap, marginal_rates, spectral_efficiency

TINY = 1e-30
MIN_SLOPE = 1e-20  # dr/db at c/b = 1e-10: keeps pulls finite


class Problem(NamedTuple):
    """What the clients could send, on which channels and band; a client without any bits is left out.

    least_bits: `[K]` bits that are sent in any case.
    step_bits: `[K, S]` bits of each further step, >= 0.
    worth: `[K, S]` seconds a bit, from 0 to MOST_WORTH; never rises along the steps.
    snr_hz: `[K]` received power over noise density, Hz, > 0.
    start_s: `[K]` when an upload can begin, finite.
    band_hz: scalar, the band, > 0.
    """

    least_bits: Array
    step_bits: Array
    worth: Array
    snr_hz: Array
    start_s: Array
    band_hz: Array


class Scaled(NamedTuple):
    """The problem in the units of the search: bits are seconds at the client's ceiling, steps lead (`[S, K]`).

    As in `min_max_latency` the unknown is the excess, latency beyond the largest `start + least_s`: what is left to a
    client is `excess + lead_s` beyond its `least_s`.
    """

    active: Array
    least_s: Array
    lead_s: Array
    step_s: Array
    reach_s: Array
    worth: Array
    snr_hz: Array
    band_hz: Array


class Breakpoints(NamedTuple):
    """At one latency, the price of the band at which each step is sent whole.

    upload_s, slack_s: `[K]` time for the upload, and what of it is not needed at the ceiling of the rate.
    least_efficiency: `[K]` nat/s/Hz without any step. efficiency, price: `[S, K]` with each step; price in s/Hz.
    log_bracket: of the price.
    """

    upload_s: Array
    slack_s: Array
    least_efficiency: Array
    efficiency: Array
    price: Array
    log_bracket: tuple[Array, Array]


class Response(NamedTuple):
    """What the clients do, `[K]` each: `inside` of a step or on the end of one, and on which share of the band."""

    active: Array
    inside: Array
    bits: Array
    upload_s: Array
    share_hz: Array
    snr_hz: Array
    by_band: Array


def scale(problem: Problem) -> Scaled:
    """The problem in the units of the search."""
    active = problem.least_bits + problem.step_bits.sum(-1) > 0
    per_bit_s = LN2 / problem.snr_hz
    least_s = problem.least_bits * per_bit_s
    earliest_s = problem.start_s - jnp.max(jnp.where(active, problem.start_s, 0.0), initial=0.0) + least_s
    bound_s = jnp.max(jnp.where(active, earliest_s, -jnp.inf), initial=-jnp.inf)
    step_s = (problem.step_bits * per_bit_s[:, None]).T
    return Scaled(
        active=active,
        least_s=least_s,
        lead_s=jnp.where(active, bound_s - earliest_s, 0.0),
        step_s=step_s,
        reach_s=lax.cumsum(step_s, axis=0),
        worth=problem.worth.T,
        snr_hz=problem.snr_hz,
        band_hz=problem.band_hz,
    )


def excess_bracket(scaled: Scaled) -> tuple[Array, Array]:
    """Excess below which the least cannot be sent, and above which everything can."""

    def needed(extra_s: Array | float, share_hz: Array) -> Array:
        ratio = scaled.snr_hz / share_hz
        beyond_s = (scaled.least_s + extra_s) * log_gap(ratio) / jnp.log1p(ratio) + extra_s - scaled.lead_s
        return jnp.max(jnp.where(scaled.active, beyond_s, 0.0), initial=0.0)

    equal_hz = scaled.band_hz / jnp.maximum(scaled.active.sum(), 1)
    high = jnp.maximum(needed(scaled.step_s.sum(0), equal_hz), 1e-12)
    return jnp.maximum(0.999 * needed(0.0, scaled.band_hz), 1e-9 * high), 1.001 * high


def breakpoints(scaled: Scaled, excess_s: Array) -> Breakpoints:
    """All breakpoints at one latency, and where the price must lie."""
    slack_s = excess_s + scaled.lead_s
    upload_s = slack_s + scaled.least_s
    left_s = slack_s - scaled.reach_s
    efficiency = spectral_efficiency((scaled.least_s + scaled.reach_s) / upload_s, left_s / upload_s)
    price = jnp.where(left_s > 0, scaled.worth * upload_s * _marginal(efficiency, left_s / upload_s), 0.0)
    least_efficiency = spectral_efficiency(scaled.least_s / upload_s, slack_s / upload_s)
    # Below `lowest` every client sends all or wants the whole band; above `highest` it sends the least.
    first = jnp.max(jnp.where(scaled.step_s > 0, scaled.worth, 0.0), 0, initial=0.0)
    highest = jnp.max(first * upload_s * _marginal(least_efficiency, slack_s / upload_s), initial=TINY)
    alone = scaled.worth[-1] * upload_s * marginal_rates(scaled.band_hz, scaled.snr_hz)[0]
    lowest = jnp.min(jnp.where(scaled.active, jnp.maximum(price[-1], alone), jnp.inf), initial=jnp.inf)
    lowest = jnp.clip(lowest, 1e-30 * highest, highest)
    bracket = jnp.log(jnp.maximum(lowest, TINY)) - 1e-3, jnp.log(highest) + 1e-3
    return Breakpoints(upload_s, slack_s, least_efficiency, efficiency, price, bracket)


def _marginal(efficiency: Array, slack: Array) -> Array:
    """dr/db from the efficiency, nat/s/Hz, and the slack to the ceiling: what `marginal_rates` is, in other terms."""
    x = efficiency - slack  # of `spectral_efficiency`: c/b = efficiency / load and 1 + x = load (1 + c/b)
    return efficiency * x / (1.0 + x) / LN2


def best_response(scaled: Scaled, at: Breakpoints, price: Array) -> tuple[Response, Array]:
    """What each client sends at a price of the band, s/Hz, and as shares of its steps `[K, S]`."""
    whole = at.price >= price
    sent_s = jnp.sum(jnp.where(whole, scaled.step_s, 0.0), 0)
    worth = jnp.max(jnp.where(whole, 0.0, scaled.worth), 0)
    ended = jnp.minimum(at.least_efficiency, jnp.min(jnp.where(whole, at.efficiency, jnp.inf), 0))
    ended_slack = (at.slack_s - sent_s) / at.upload_s

    # Inside of the next step, dr/db is price / (worth upload).
    by_band = price / jnp.maximum(worth * at.upload_s, TINY)
    opened = _efficiency_at(by_band)
    opened_s = at.upload_s * opened / jnp.expm1(opened)
    inside = scaled.active & (opened_s > scaled.least_s + sent_s) & (worth > 0)

    efficiency = jnp.where(inside, opened, ended)
    total_s = jnp.where(inside, opened_s, scaled.least_s + sent_s)
    response = Response(
        active=scaled.active,
        inside=inside,
        bits=jnp.where(scaled.active, total_s * scaled.snr_hz / LN2, 0.0),
        upload_s=at.upload_s,
        share_hz=jnp.where(scaled.active, scaled.snr_hz * total_s / (at.upload_s * efficiency), 0.0),
        snr_hz=scaled.snr_hz,
        by_band=jnp.maximum(jnp.where(inside, by_band, _marginal(ended, ended_slack)), MIN_SLOPE),
    )
    next_step = ~whole & jnp.pad(whole[:-1], ((1, 0), (0, 0)), constant_values=True)
    fraction = jnp.clip((opened_s - scaled.least_s - sent_s) / jnp.maximum(scaled.step_s, TINY), 0.0, 1.0)
    return response, jnp.where(whole, 1.0, jnp.where(next_step & inside, fraction, 0.0)).T


def _efficiency_at(by_band: Array) -> Array:
    """`[...]` nat/s/Hz at which dr/db has a value: y with `y - 1 + exp(-y) = by_band ln2`."""
    target = jnp.minimum(by_band * LN2, 60.0)
    t = jnp.sqrt(2.0 * target)
    series = t * (1.0 + t * (1 / 6 + t * (1 / 36 + t * (1 / 270))))
    y = jnp.where(target < 1.0, series, 1.0 + target - jnp.exp(-1.0 - target))
    for _ in range(2):
        y = y - (y + jnp.expm1(-y) - target) / -jnp.expm1(-y)
    return jnp.maximum(jnp.where(target < 0.02, series, y), TINY)


def pull_of(response: Response) -> Array:
    """`[K]` band that a second more frees, Hz/s."""
    return response.bits / response.upload_s / response.by_band / response.upload_s


def linearise(
    response: Response,
    d_log_price: Array | float = 0.0,
    d_upload: Array | float = 0.0,
    d_log_worth: Array | float = 0.0,
    d_bits: Array | float = 0.0,
    d_snr: Array | float = 0.0,
) -> tuple[Array, Array, Array]:
    """Changes `[K]` of share, log pull and bits; `d_bits` is that of a client on the end of a step."""
    share_hz = jnp.where(response.share_hz > 0, response.share_hz, 1.0)
    bits = jnp.where(response.bits > 0, response.bits, 1.0)
    signal = response.snr_hz / (share_hz + response.snr_hz)
    by_snr = (1.0 - signal) / LN2
    curvature = -signal * signal / share_hz / LN2
    cross = signal / (share_hz + response.snr_hz) / LN2

    rate = bits / response.upload_s
    d_log_upload = d_upload / response.upload_s
    ended_share = (rate * (d_bits / bits - d_log_upload) - by_snr * d_snr) / response.by_band
    inside_slope = d_log_price - d_log_worth - d_log_upload
    inside_share = (response.by_band * inside_slope - cross * d_snr) / jnp.minimum(curvature, -TINY)
    d_share = jnp.where(response.active, jnp.where(response.inside, inside_share, ended_share), 0.0)
    ended_slope = (curvature * ended_share + cross * d_snr) / response.by_band
    d_slope = jnp.where(response.inside, inside_slope, ended_slope)
    d_log_bits = (response.by_band * d_share + by_snr * d_snr) / rate + d_log_upload
    d_log_pull = jnp.where(response.active, d_log_bits - d_slope - 2.0 * d_log_upload, 0.0)
    return d_share, d_log_pull, bits * d_log_bits
