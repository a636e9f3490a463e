"""What clients do at a latency and a price of the band: the parts that the solver of TSFA online is made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.wireless.rate import LN2, log_gap, marginal_rates, spectral_efficiency

TINY = 1e-30
MIN_SLOPE = 1e-20  # dr/db at c/b = 1e-10: keeps pulls finite


class Offer(NamedTuple):
    """What the clients could send; one without any bits is left out.

    least_bits: `[K]` bits that are sent in any case.
    step_bits: `[K, S]` bits of each further step, >= 0.
    worth: `[K, S]` seconds a bit, from 0 to MOST_WORTH; never rises along the steps.
    snr_hz: `[K]` received power over noise density, Hz, > 0.
    start_s: `[K]` when an upload can begin, finite.
    bandwidth_hz: scalar, the band, > 0.
    """

    least_bits: Array
    step_bits: Array
    worth: Array
    snr_hz: Array
    start_s: Array
    bandwidth_hz: Array


class Frame(NamedTuple):
    """An offer in the units of the search: bits are seconds at the client's ceiling, steps lead (`[S, K]`).

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
    bandwidth_hz: Array


class Table(NamedTuple):
    """One latency: upload and slack `[K]`, efficiency without and with each step, price at which it is sent whole."""

    upload_s: Array
    slack_s: Array
    least_efficiency: Array
    efficiency: Array
    price: Array
    log_bracket: tuple[Array, Array]


class Point(NamedTuple):
    """What the clients do, `[K]` each: `inside` a step or on the end of one, and at which share of the band."""

    active: Array
    inside: Array
    bits: Array
    upload_s: Array
    share_hz: Array
    snr_hz: Array
    by_band: Array


def frame_of(offer: Offer) -> Frame:
    """The offer in the units of the search."""
    active = offer.least_bits + offer.step_bits.sum(-1) > 0
    per_bit_s = LN2 / offer.snr_hz
    least_s = offer.least_bits * per_bit_s
    earliest_s = offer.start_s - jnp.max(jnp.where(active, offer.start_s, 0.0), initial=0.0) + least_s
    bound_s = jnp.max(jnp.where(active, earliest_s, -jnp.inf), initial=-jnp.inf)
    step_s = (offer.step_bits * per_bit_s[:, None]).T
    return Frame(
        active=active,
        least_s=least_s,
        lead_s=jnp.where(active, bound_s - earliest_s, 0.0),
        step_s=step_s,
        reach_s=lax.cumsum(step_s, axis=0),
        worth=offer.worth.T,
        snr_hz=offer.snr_hz,
        bandwidth_hz=offer.bandwidth_hz,
    )


def excess_bracket(frame: Frame) -> tuple[Array, Array]:
    """Excess below which the least cannot be sent, and above which everything can."""

    def needed(extra_s: Array | float, share_hz: Array) -> Array:
        ratio = frame.snr_hz / share_hz
        beyond_s = (frame.least_s + extra_s) * log_gap(ratio) / jnp.log1p(ratio) + extra_s - frame.lead_s
        return jnp.max(jnp.where(frame.active, beyond_s, 0.0), initial=0.0)

    equal_hz = frame.bandwidth_hz / jnp.maximum(frame.active.sum(), 1)
    high = jnp.maximum(needed(frame.step_s.sum(0), equal_hz), 1e-12)
    return jnp.maximum(0.999 * needed(0.0, frame.bandwidth_hz), 1e-9 * high), 1.001 * high


def tabulate(frame: Frame, excess_s: Array) -> Table:
    """All breakpoints at one latency, and where the price must lie."""
    slack_s = excess_s + frame.lead_s
    upload_s = slack_s + frame.least_s
    left_s = slack_s - frame.reach_s
    efficiency = spectral_efficiency((frame.least_s + frame.reach_s) / upload_s, left_s / upload_s)
    price = jnp.where(left_s > 0, frame.worth * upload_s * _marginal(efficiency, left_s / upload_s), 0.0)
    least_efficiency = spectral_efficiency(frame.least_s / upload_s, slack_s / upload_s)
    # Below `lowest` every client sends all or wants the whole band; above `highest` it sends the least.
    first = jnp.max(jnp.where(frame.step_s > 0, frame.worth, 0.0), 0, initial=0.0)
    highest = jnp.max(first * upload_s * _marginal(least_efficiency, slack_s / upload_s), initial=TINY)
    alone = frame.worth[-1] * upload_s * marginal_rates(frame.bandwidth_hz, frame.snr_hz)[0]
    lowest = jnp.min(jnp.where(frame.active, jnp.maximum(price[-1], alone), jnp.inf), initial=jnp.inf)
    lowest = jnp.clip(lowest, 1e-30 * highest, highest)
    bracket = jnp.log(jnp.maximum(lowest, TINY)) - 1e-3, jnp.log(highest) + 1e-3
    return Table(upload_s, slack_s, least_efficiency, efficiency, price, bracket)


def _marginal(efficiency: Array, slack: Array) -> Array:
    """dr/db from the efficiency, nat/s/Hz, and the slack to the ceiling: what `marginal_rates` is, in other terms."""
    x = efficiency - slack  # of `spectral_efficiency`: c/b = efficiency / load and 1 + x = load (1 + c/b)
    return efficiency * x / (1.0 + x) / LN2


def respond(frame: Frame, table: Table, price: Array) -> tuple[Point, Array]:
    """What each client sends at a price of the band, s/Hz, and as shares of its steps `[K, S]`."""
    whole = table.price >= price
    sent_s = jnp.sum(jnp.where(whole, frame.step_s, 0.0), 0)
    worth = jnp.max(jnp.where(whole, 0.0, frame.worth), 0)
    ended = jnp.minimum(table.least_efficiency, jnp.min(jnp.where(whole, table.efficiency, jnp.inf), 0))
    ended_slack = (table.slack_s - sent_s) / table.upload_s

    # Inside of the next step, dr/db is price / (worth upload).
    by_band = price / jnp.maximum(worth * table.upload_s, TINY)
    opened = _efficiency_at(by_band)
    opened_s = table.upload_s * opened / jnp.expm1(opened)
    inside = frame.active & (opened_s > frame.least_s + sent_s) & (worth > 0)

    efficiency = jnp.where(inside, opened, ended)
    total_s = jnp.where(inside, opened_s, frame.least_s + sent_s)
    point = Point(
        active=frame.active,
        inside=inside,
        bits=jnp.where(frame.active, total_s * frame.snr_hz / LN2, 0.0),
        upload_s=table.upload_s,
        share_hz=jnp.where(frame.active, frame.snr_hz * total_s / (table.upload_s * efficiency), 0.0),
        snr_hz=frame.snr_hz,
        by_band=jnp.maximum(jnp.where(inside, by_band, _marginal(ended, ended_slack)), MIN_SLOPE),
    )
    next_step = ~whole & jnp.pad(whole[:-1], ((1, 0), (0, 0)), constant_values=True)
    fraction = jnp.clip((opened_s - frame.least_s - sent_s) / jnp.maximum(frame.step_s, TINY), 0.0, 1.0)
    return point, jnp.where(whole, 1.0, jnp.where(next_step & inside, fraction, 0.0)).T


def _efficiency_at(by_band: Array) -> Array:
    """`[...]` nat/s/Hz at which dr/db has a value: y with `y - 1 + exp(-y) = by_band ln2`."""
    target = jnp.minimum(by_band * LN2, 60.0)
    t = jnp.sqrt(2.0 * target)
    series = t * (1.0 + t * (1 / 6 + t * (1 / 36 + t * (1 / 270))))
    y = jnp.where(target < 1.0, series, 1.0 + target - jnp.exp(-1.0 - target))
    for _ in range(2):
        y = y - (y + jnp.expm1(-y) - target) / -jnp.expm1(-y)
    return jnp.maximum(jnp.where(target < 0.02, series, y), TINY)


def pull_of(point: Point) -> Array:
    """`[K]` band that a second more frees, Hz/s."""
    return point.bits / point.upload_s / point.by_band / point.upload_s


def linearise(
    point: Point,
    d_log_price: Array | float = 0.0,
    d_upload: Array | float = 0.0,
    d_log_worth: Array | float = 0.0,
    d_bits: Array | float = 0.0,
    d_snr: Array | float = 0.0,
) -> tuple[Array, Array, Array]:
    """Changes `[K]` of share, log pull and bits; `d_bits` is that of a client on the end of a step."""
    share_hz = jnp.where(point.share_hz > 0, point.share_hz, 1.0)
    bits = jnp.where(point.bits > 0, point.bits, 1.0)
    signal = point.snr_hz / (share_hz + point.snr_hz)
    by_snr = (1.0 - signal) / LN2
    curvature = -signal * signal / share_hz / LN2
    cross = signal / (share_hz + point.snr_hz) / LN2

    rate = bits / point.upload_s
    d_log_upload = d_upload / point.upload_s
    ended_share = (rate * (d_bits / bits - d_log_upload) - by_snr * d_snr) / point.by_band
    inside_slope = d_log_price - d_log_worth - d_log_upload
    inside_share = (point.by_band * inside_slope - cross * d_snr) / jnp.minimum(curvature, -TINY)
    d_share = jnp.where(point.active, jnp.where(point.inside, inside_share, ended_share), 0.0)
    ended_slope = (curvature * ended_share + cross * d_snr) / point.by_band
    d_slope = jnp.where(point.inside, inside_slope, ended_slope)
    d_log_bits = (point.by_band * d_share + by_snr * d_snr) / rate + d_log_upload
    d_log_pull = jnp.where(point.active, d_log_bits - d_slope - 2.0 * d_log_upload, 0.0)
    return d_share, d_log_pull, bits * d_log_bits
