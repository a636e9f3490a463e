"""The core of TSFA online: how much each client sends, when time, band and what is sent all have a price.

A client must send `least_bits` and may send S steps more, in order; a bit of step j is worth `worth_j` seconds of
latency. Minimised is `latency - worth of what is sent`, with the latency of `wireless.min_max_latency`. With `mu` the
price of the band in s/Hz and `upload_k = latency - start_k`, the optimality conditions are

    mu = worth_j upload_k dr/db           for a client inside of its step j,
    sum_k b_k = B,
    mu sum_k pull_k = 1,                  pull_k = bits_k / (dr/db upload_k^2), the band that a second frees.

For a given latency the problem is convex with the one unknown mu; the latency is a search around it. Both are roots
found by Newton's method within a bracket, with the exact slopes of `_linearise`, which also gives the gradients.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.wireless.allocation import min_max_latency
from fedjax_lora.wireless.rate import LN2, log_gap, marginal_rates, spectral_efficiency, uplink_rate

MOST_WORTH = 1e20
"""Seconds a bit: what is worth as much is sent at any price."""

_TINY = 1e-30
_MIN_SLOPE = 1e-20  # dr/db at c/b = 1e-10: keeps pulls finite
_OFF_BALANCE = 80.0  # a log, where the least does not fit the time at all
_ITERATIONS = 40
_CELLS = 96  # searches apart, over the number of clients: the objective of few clients has several local minima
_BAND_TOLERANCE = 3e-6  # of the logarithms whose roots are searched
_TIME_TOLERANCE = 1e-4  # the objective is flat there: an error of its square
_WIDTH = 3e-6  # of a bracket, in logarithms

Aux = TypeVar("Aux")


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


class _Frame(NamedTuple):
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


class _Table(NamedTuple):
    """One latency: upload and slack `[K]`, efficiency without and with each step, price at which it is sent whole."""

    upload_s: Array
    slack_s: Array
    least_efficiency: Array
    efficiency: Array
    price: Array
    log_bracket: tuple[Array, Array]


class _Point(NamedTuple):
    """What the clients do, `[K]` each: `inside` a step or on the end of one, and at which share of the band."""

    active: Array
    inside: Array
    bits: Array
    upload_s: Array
    share_hz: Array
    snr_hz: Array
    by_band: Array


@jax.custom_jvp
def sent_share(offer: Offer) -> Array:
    """`[K, S]` share of each step that is best sent: ones, then at most one fraction, then zeros.

    Its gradient is implicit in the optimality conditions: a client inside of a step moves within it, one on the end
    of a step stays there.
    """
    frame = _frame(offer)

    def at_latency(log_excess: Array, before: tuple[Array, _Point]) -> tuple[Array, Array, tuple[Array, _Point]]:
        table = _tabulate(frame, jnp.exp(log_excess))
        log_price, point = _clear(frame, table, before[0])
        value, slope = _worth_of_time(point, log_price)
        fits = jnp.sum(point.share_hz) <= 1.001 * frame.bandwidth_hz
        return jnp.where(fits, value, _OFF_BALANCE), jnp.exp(log_excess) * slope, (log_price, point)

    def search(low: Array, high: Array) -> tuple[Array, Array]:
        blank = jax.tree.map(jnp.zeros_like, (low, _respond(frame, _tabulate(frame, jnp.exp(low)), low)[0]))
        log_excess, (_, point) = _root(at_latency, low, high, 0.5 * (low + high), blank, _TIME_TOLERANCE)
        # The price that the latency sets puts a client that belongs on the end of a step exactly there.
        price = 1.0 / jnp.maximum(jnp.sum(_pull(point)), _TINY)
        share = _respond(frame, _tabulate(frame, jnp.exp(log_excess)), price)[1]
        return share, objective(offer, share)

    low, high = (jnp.log(excess_s) for excess_s in _excess_bracket(frame))
    cells = _CELLS // max(1, len(offer.least_bits))
    if cells <= 1:
        return search(low, high)[0]
    edges = jnp.linspace(low, high, cells + 1)
    share, found = jax.vmap(search)(edges[:-1], edges[1:])
    return share[jnp.argmin(found)]


def objective(offer: Offer, share: Array) -> Array:
    """Latency less the worth of what is sent; s."""
    bits = offer.least_bits + jnp.sum(share * offer.step_bits, -1)
    allocation = min_max_latency(bits, offer.snr_hz, offer.start_s, offer.bandwidth_hz)
    return allocation.latency_s - jnp.sum(share * offer.step_bits * offer.worth)


def _frame(offer: Offer) -> _Frame:
    active = offer.least_bits + offer.step_bits.sum(-1) > 0
    per_bit_s = LN2 / offer.snr_hz
    least_s = offer.least_bits * per_bit_s
    earliest_s = offer.start_s - jnp.max(jnp.where(active, offer.start_s, 0.0), initial=0.0) + least_s
    bound_s = jnp.max(jnp.where(active, earliest_s, -jnp.inf), initial=-jnp.inf)
    step_s = (offer.step_bits * per_bit_s[:, None]).T
    return _Frame(
        active=active,
        least_s=least_s,
        lead_s=jnp.where(active, bound_s - earliest_s, 0.0),
        step_s=step_s,
        reach_s=lax.cumsum(step_s, axis=0),
        worth=offer.worth.T,
        snr_hz=offer.snr_hz,
        bandwidth_hz=offer.bandwidth_hz,
    )


def _excess_bracket(frame: _Frame) -> tuple[Array, Array]:
    """Excess below which the least cannot be sent, and above which everything can."""

    def needed(extra_s: Array | float, share_hz: Array) -> Array:
        ratio = frame.snr_hz / share_hz
        beyond_s = (frame.least_s + extra_s) * log_gap(ratio) / jnp.log1p(ratio) + extra_s - frame.lead_s
        return jnp.max(jnp.where(frame.active, beyond_s, 0.0), initial=0.0)

    equal_hz = frame.bandwidth_hz / jnp.maximum(frame.active.sum(), 1)
    high = jnp.maximum(needed(frame.step_s.sum(0), equal_hz), 1e-12)
    return jnp.maximum(0.999 * needed(0.0, frame.bandwidth_hz), 1e-9 * high), 1.001 * high


def _tabulate(frame: _Frame, excess_s: Array) -> _Table:
    slack_s = excess_s + frame.lead_s
    upload_s = slack_s + frame.least_s
    left_s = slack_s - frame.reach_s
    efficiency = spectral_efficiency((frame.least_s + frame.reach_s) / upload_s, left_s / upload_s)
    price = jnp.where(left_s > 0, frame.worth * upload_s * _marginal(efficiency, left_s / upload_s), 0.0)
    least_efficiency = spectral_efficiency(frame.least_s / upload_s, slack_s / upload_s)
    # Below `lowest` every client sends all or wants the whole band; above `highest` it sends the least.
    first = jnp.max(jnp.where(frame.step_s > 0, frame.worth, 0.0), 0, initial=0.0)
    highest = jnp.max(first * upload_s * _marginal(least_efficiency, slack_s / upload_s), initial=_TINY)
    alone = frame.worth[-1] * upload_s * marginal_rates(frame.bandwidth_hz, frame.snr_hz)[0]
    lowest = jnp.min(jnp.where(frame.active, jnp.maximum(price[-1], alone), jnp.inf), initial=jnp.inf)
    lowest = jnp.clip(lowest, 1e-30 * highest, highest)
    bracket = jnp.log(jnp.maximum(lowest, _TINY)) - 1e-3, jnp.log(highest) + 1e-3
    return _Table(upload_s, slack_s, least_efficiency, efficiency, price, bracket)


def _marginal(efficiency: Array, slack: Array) -> Array:
    """dr/db from the efficiency, nat/s/Hz, and the slack to the ceiling: what `marginal_rates` is, in other terms."""
    x = efficiency - slack  # of `spectral_efficiency`: c/b = efficiency / load and 1 + x = load (1 + c/b)
    return efficiency * x / (1.0 + x) / LN2


def _respond(frame: _Frame, table: _Table, price: Array) -> tuple[_Point, Array]:
    """What each client sends at a price of the band, s/Hz, and as shares of its steps `[K, S]`."""
    whole = table.price >= price
    sent_s = jnp.sum(jnp.where(whole, frame.step_s, 0.0), 0)
    worth = jnp.max(jnp.where(whole, 0.0, frame.worth), 0)
    ended = jnp.minimum(table.least_efficiency, jnp.min(jnp.where(whole, table.efficiency, jnp.inf), 0))
    ended_slack = (table.slack_s - sent_s) / table.upload_s

    # Inside of the next step, dr/db is price / (worth upload).
    by_band = price / jnp.maximum(worth * table.upload_s, _TINY)
    opened = _efficiency_at(by_band)
    opened_s = table.upload_s * opened / jnp.expm1(opened)
    inside = frame.active & (opened_s > frame.least_s + sent_s) & (worth > 0)

    efficiency = jnp.where(inside, opened, ended)
    total_s = jnp.where(inside, opened_s, frame.least_s + sent_s)
    point = _Point(
        active=frame.active,
        inside=inside,
        bits=jnp.where(frame.active, total_s * frame.snr_hz / LN2, 0.0),
        upload_s=table.upload_s,
        share_hz=jnp.where(frame.active, frame.snr_hz * total_s / (table.upload_s * efficiency), 0.0),
        snr_hz=frame.snr_hz,
        by_band=jnp.maximum(jnp.where(inside, by_band, _marginal(ended, ended_slack)), _MIN_SLOPE),
    )
    next_step = ~whole & jnp.pad(whole[:-1], ((1, 0), (0, 0)), constant_values=True)
    fraction = jnp.clip((opened_s - frame.least_s - sent_s) / jnp.maximum(frame.step_s, _TINY), 0.0, 1.0)
    return point, jnp.where(whole, 1.0, jnp.where(next_step & inside, fraction, 0.0)).T


def _efficiency_at(by_band: Array) -> Array:
    """`[...]` nat/s/Hz at which dr/db has a value: y with `y - 1 + exp(-y) = by_band ln2`."""
    target = jnp.minimum(by_band * LN2, 60.0)
    t = jnp.sqrt(2.0 * target)
    series = t * (1.0 + t * (1 / 6 + t * (1 / 36 + t * (1 / 270))))
    y = jnp.where(target < 1.0, series, 1.0 + target - jnp.exp(-1.0 - target))
    for _ in range(2):
        y = y - (y + jnp.expm1(-y) - target) / -jnp.expm1(-y)
    return jnp.maximum(jnp.where(target < 0.02, series, y), _TINY)


def _clear(frame: _Frame, table: _Table, guess: Array) -> tuple[Array, _Point]:
    """The logarithm of the price at which the band is used up, and what the clients do at it."""

    def at_price(log_price: Array, before: _Point) -> tuple[Array, Array, _Point]:
        del before
        point = _respond(frame, table, jnp.exp(log_price))[0]
        used_hz = jnp.maximum(jnp.sum(point.share_hz), _TINY)
        slope = jnp.sum(_linearise(point, d_log_price=1.0)[0]) / used_hz
        return jnp.log(used_hz / frame.bandwidth_hz), slope, point

    low, high = table.log_bracket
    blank = jax.tree.map(jnp.zeros_like, _respond(frame, table, low)[0])
    return _root(at_price, low, high, jnp.clip(guess, low, high), blank, _BAND_TOLERANCE)


def _worth_of_time(point: _Point, log_price: Array) -> tuple[Array, Array]:
    """The logarithm of what a second more saves in band, in seconds, and its derivative by the latency."""
    pull = _pull(point)
    total = jnp.maximum(jnp.sum(pull), _TINY)
    by_price, pull_by_price, _ = _linearise(point, d_log_price=1.0)
    by_time, pull_by_time, _ = _linearise(point, d_upload=1.0)
    d_log_price = -jnp.sum(by_time) / jnp.minimum(jnp.sum(by_price), -_TINY)
    slope = d_log_price + jnp.sum(pull * (pull_by_time + pull_by_price * d_log_price)) / total
    return log_price + jnp.log(total), slope


def _pull(point: _Point) -> Array:
    return point.bits / point.upload_s / point.by_band / point.upload_s


def _linearise(
    point: _Point,
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
    inside_share = (point.by_band * inside_slope - cross * d_snr) / jnp.minimum(curvature, -_TINY)
    d_share = jnp.where(point.active, jnp.where(point.inside, inside_share, ended_share), 0.0)
    ended_slope = (curvature * ended_share + cross * d_snr) / point.by_band
    d_slope = jnp.where(point.inside, inside_slope, ended_slope)
    d_log_bits = (point.by_band * d_share + by_snr * d_snr) / rate + d_log_upload
    d_log_pull = jnp.where(point.active, d_log_bits - d_slope - 2.0 * d_log_upload, 0.0)
    return d_share, d_log_pull, bits * d_log_bits


@sent_share.defjvp
def _sent_share_jvp(primals: tuple[Offer], tangents: tuple[Offer]) -> tuple[Array, Array]:
    """Implicit: the conditions are linear in the changes of log price and latency, two equations for two unknowns."""
    (offer,), (d_offer,) = primals, tangents
    share = sent_share(offer)
    bits = offer.least_bits + jnp.sum(share * offer.step_bits, -1)
    share_hz = min_max_latency(bits, offer.snr_hz, offer.start_s, offer.bandwidth_hz).bandwidth_hz
    step = (share > 0) & (share < 1) & (offer.step_bits > 0)
    active, inside = bits > 0, step.any(-1)
    safe_hz = jnp.where(active, share_hz, 1.0)
    point = _Point(
        active=active,
        inside=inside,
        bits=bits,
        upload_s=jnp.where(active, bits / jnp.maximum(uplink_rate(safe_hz, offer.snr_hz), _TINY), 1.0),
        share_hz=share_hz,
        snr_hz=offer.snr_hz,
        by_band=jnp.maximum(marginal_rates(safe_hz, offer.snr_hz)[0], _MIN_SLOPE),
    )
    worth = jnp.where(step, offer.worth, 0.0).sum(-1)
    d_worth = jnp.where(step, d_offer.worth, 0.0).sum(-1)
    held = d_offer.least_bits + jnp.sum(share * d_offer.step_bits, -1)
    of_data = {
        "d_upload": -d_offer.start_s,
        "d_log_worth": d_worth / jnp.where(inside, worth, 1.0),
        "d_bits": held,
        "d_snr": d_offer.snr_hz,
    }
    pull = _pull(point)
    weight = pull / jnp.maximum(jnp.sum(pull), _TINY)

    def misses(changes: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        d_share, d_log_pull, _ = changes
        return jnp.sum(d_share) / offer.bandwidth_hz, jnp.sum(weight * d_log_pull)

    by_price, by_time = _linearise(point, d_log_price=1.0), _linearise(point, d_upload=1.0)
    data = _linearise(point, **of_data)
    (a, c), (b, d) = misses(by_price), misses(by_time)
    c += 1.0
    band, time = misses(data)
    band -= d_offer.bandwidth_hz / offer.bandwidth_hz
    determinant = a * d - b * c
    safe = jnp.where(jnp.abs(determinant) > _TINY, determinant, jnp.inf)
    d_log_price, d_latency = (b * time - d * band) / safe, (c * band - a * time) / safe
    d_bits = data[2] + by_price[2] * d_log_price + by_time[2] * d_latency
    d_share = jnp.where(step, (d_bits - held)[:, None] / jnp.where(step, offer.step_bits, 1.0), 0.0)
    return share, d_share


def _root(
    function: Callable[[Array, Aux], tuple[Array, Array, Aux]],
    low: Array,
    high: Array,
    start: Array,
    blank: Aux,
    tolerance: float,
) -> tuple[Array, Aux]:
    """A zero of a falling function in a bracket: Newton's steps, halves where they leave it or gain too little.

    The function takes a point and its own previous by-product, and gives value, slope and by-product; returned are
    the last point and its by-product.
    """

    class State(NamedTuple):
        low: Array
        high: Array
        point: Array
        upcoming: Array
        value: Array
        halved: Array
        count: Array
        aux: Aux

    def unfinished(state: State) -> Array:
        open_ = (jnp.abs(state.value) > tolerance) & (state.high - state.low > _WIDTH)
        return (state.count == 0) | (open_ & (state.count < _ITERATIONS))

    def step(state: State) -> State:
        point = state.upcoming
        value, slope, aux = function(point, state.aux)
        low, high = jnp.where(value > 0, point, state.low), jnp.where(value > 0, state.high, point)
        newton = point - value / jnp.minimum(slope, -_TINY)
        gains = state.halved | (jnp.abs(value) < 0.5 * jnp.abs(state.value))
        take = (newton > low) & (newton < high) & gains
        upcoming = jnp.where(take, newton, 0.5 * (low + high))
        return State(low, high, point, upcoming, value, ~take, state.count + 1, aux)

    first = State(low, high, start, start, jnp.full_like(low, jnp.inf), jnp.array(True), jnp.array(0), blank)
    final = lax.while_loop(unfinished, step, first)
    return final.point, final.aux
