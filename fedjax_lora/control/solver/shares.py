"""The core of TSFA online: how much each client sends, when time, band and what is sent all have a price.

A client must send `least_bits` and may send S steps more, in order; a bit of step j is worth `worth_j` seconds of
latency. Minimised is `latency - worth of what is sent`, with the latency of `wireless.min_max_latency`. With `mu` the
price of the band in s/Hz and `upload_k = latency - start_k`, the optimality conditions are

    mu = worth_j upload_k dr/db           for a client inside of its step j,
    sum_k b_k = B,
    mu sum_k pull_k = 1,                  pull_k = bits_k / (dr/db upload_k^2), the band that a second frees.

For a given latency the problem is convex with the one unknown mu; the latency is a search around it. Both are roots
found by Newton's method within a bracket, with the exact slopes of `linearise`, which also gives the gradients.
"""

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.control.solver.best_response import (
    MIN_SLOPE,
    TINY,
    Frame,
    Offer,
    Point,
    Table,
    excess_bracket,
    frame_of,
    linearise,
    pull_of,
    respond,
    tabulate,
)
from fedjax_lora.control.solver.newton import root
from fedjax_lora.wireless.allocation import min_max_latency
from fedjax_lora.wireless.rate import marginal_rates, uplink_rate

MOST_WORTH = 1e20
"""Seconds a bit: what is worth as much is sent at any price."""

_OFF_BALANCE = 80.0  # a log, where the least does not fit the time at all
_CELLS = 96  # searches apart, over the number of clients: the objective of few clients has several local minima
_BAND_TOLERANCE = 1e-6  # of the logarithms whose roots are searched
_TIME_TOLERANCE = 1e-5  # the objective is flat there: an error of its square


@jax.custom_jvp
def sent_share(offer: Offer) -> Array:
    """`[K, S]` share of each step that is best sent: ones, then at most one fraction, then zeros.

    Its gradient is implicit in the optimality conditions: a client inside of a step moves within it, one on the end
    of a step stays there.
    """
    frame = frame_of(offer)

    def at_latency(log_excess: Array, before: tuple[Array, Point]) -> tuple[Array, Array, tuple[Array, Point]]:
        table = tabulate(frame, jnp.exp(log_excess))
        log_price, point = _clear(frame, table, before[0])
        value, slope = _worth_of_time(point, log_price)
        fits = jnp.sum(point.share_hz) <= 1.001 * frame.bandwidth_hz
        return jnp.where(fits, value, _OFF_BALANCE), jnp.exp(log_excess) * slope, (log_price, point)

    def search(low: Array, high: Array) -> tuple[Array, Array]:
        blank = jax.tree.map(jnp.zeros_like, (low, respond(frame, tabulate(frame, jnp.exp(low)), low)[0]))
        log_excess, (_, point) = root(at_latency, low, high, 0.5 * (low + high), blank, _TIME_TOLERANCE)
        # The price that the latency sets puts a client that belongs on the end of a step exactly there.
        price = 1.0 / jnp.maximum(jnp.sum(pull_of(point)), TINY)
        share = respond(frame, tabulate(frame, jnp.exp(log_excess)), price)[1]
        return share, objective(offer, share)

    low, high = (jnp.log(excess_s) for excess_s in excess_bracket(frame))
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


def _clear(frame: Frame, table: Table, guess: Array) -> tuple[Array, Point]:
    """The logarithm of the price at which the band is used up, and what the clients do at it."""

    def at_price(log_price: Array, before: Point) -> tuple[Array, Array, Point]:
        del before
        point = respond(frame, table, jnp.exp(log_price))[0]
        used_hz = jnp.maximum(jnp.sum(point.share_hz), TINY)
        slope = jnp.sum(linearise(point, d_log_price=1.0)[0]) / used_hz
        return jnp.log(used_hz / frame.bandwidth_hz), slope, point

    low, high = table.log_bracket
    blank = jax.tree.map(jnp.zeros_like, respond(frame, table, low)[0])
    return root(at_price, low, high, jnp.clip(guess, low, high), blank, _BAND_TOLERANCE)


def _worth_of_time(point: Point, log_price: Array) -> tuple[Array, Array]:
    """The logarithm of what a second more saves in band, in seconds, and its derivative by the latency."""
    pull = pull_of(point)
    total = jnp.maximum(jnp.sum(pull), TINY)
    by_price, pull_by_price, _ = linearise(point, d_log_price=1.0)
    by_time, pull_by_time, _ = linearise(point, d_upload=1.0)
    d_log_price = -jnp.sum(by_time) / jnp.minimum(jnp.sum(by_price), -TINY)
    slope = d_log_price + jnp.sum(pull * (pull_by_time + pull_by_price * d_log_price)) / total
    return log_price + jnp.log(total), slope


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
    point = Point(
        active=active,
        inside=inside,
        bits=bits,
        upload_s=jnp.where(active, bits / jnp.maximum(uplink_rate(safe_hz, offer.snr_hz), TINY), 1.0),
        share_hz=share_hz,
        snr_hz=offer.snr_hz,
        by_band=jnp.maximum(marginal_rates(safe_hz, offer.snr_hz)[0], MIN_SLOPE),
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
    pull = pull_of(point)
    weight = pull / jnp.maximum(jnp.sum(pull), TINY)

    def misses(changes: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        d_share, d_log_pull, _ = changes
        return jnp.sum(d_share) / offer.bandwidth_hz, jnp.sum(weight * d_log_pull)

    by_price, by_time = linearise(point, d_log_price=1.0), linearise(point, d_upload=1.0)
    data = linearise(point, **of_data)
    (a, c), (b, d) = misses(by_price), misses(by_time)
    c += 1.0
    band, time = misses(data)
    band -= d_offer.bandwidth_hz / offer.bandwidth_hz
    determinant = a * d - b * c
    safe = jnp.where(jnp.abs(determinant) > TINY, determinant, jnp.inf)
    d_log_price, d_latency = (b * time - d * band) / safe, (c * band - a * time) / safe
    d_bits = data[2] + by_price[2] * d_log_price + by_time[2] * d_latency
    d_share = jnp.where(step, (d_bits - held)[:, None] / jnp.where(step, offer.step_bits, 1.0), 0.0)
    return share, d_share
