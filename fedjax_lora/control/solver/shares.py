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
    Breakpoints,
    Problem,
    Response,
    Scaled,
    best_response,
    breakpoints,
    excess_bracket,
    linearise,
    pull_of,
    scale,
)
from fedjax_lora.control.solver.newton import newton
from fedjax_lora.wireless.allocation import min_max_latency
from fedjax_lora.wireless.rate import marginal_rates, uplink_rate

MOST_WORTH = 1e20
"""Seconds a bit: what is worth as much is sent at any price."""

_OFF_BALANCE = 80.0  # a log, where the least does not fit the time at all
_CELLS = 96  # searches apart, over the number of clients: the objective of few clients has several local minima
_BAND_TOLERANCE = 1e-6  # of the logarithms whose roots are searched
_TIME_TOLERANCE = 1e-5  # the objective is flat there: an error of its square


@jax.custom_jvp
def sent_share(problem: Problem) -> Array:
    """`[K, S]` share of each step that is best sent: ones, then at most one fraction, then zeros.

    Its gradient is implicit in the optimality conditions: a client inside of a step moves within it, one on the end
    of a step stays there.
    """
    scaled = scale(problem)

    def at_latency(log_excess: Array, before: tuple[Array, Response]) -> tuple[Array, Array, tuple[Array, Response]]:
        at = breakpoints(scaled, jnp.exp(log_excess))
        log_price, response = _clear(scaled, at, before[0])
        value, slope = _worth_of_time(response, log_price)
        fits = jnp.sum(response.share_hz) <= 1.001 * scaled.band_hz
        return jnp.where(fits, value, _OFF_BALANCE), jnp.exp(log_excess) * slope, (log_price, response)

    def search(low: Array, high: Array) -> tuple[Array, Array]:
        blank = jax.tree.map(jnp.zeros_like, (low, best_response(scaled, breakpoints(scaled, jnp.exp(low)), low)[0]))
        log_excess, (_, response) = newton(at_latency, low, high, 0.5 * (low + high), blank, _TIME_TOLERANCE)
        # The price that the latency sets puts a client that belongs on the end of a step exactly there.
        price = 1.0 / jnp.maximum(jnp.sum(pull_of(response)), TINY)
        share = best_response(scaled, breakpoints(scaled, jnp.exp(log_excess)), price)[1]
        return share, objective(problem, share)

    low, high = (jnp.log(excess_s) for excess_s in excess_bracket(scaled))
    cells = _CELLS // max(1, len(problem.least_bits))
    if cells <= 1:
        return search(low, high)[0]
    edges = jnp.linspace(low, high, cells + 1)
    share, found = jax.vmap(search)(edges[:-1], edges[1:])
    return share[jnp.argmin(found)]


def objective(problem: Problem, share: Array) -> Array:
    """Latency less the worth of what is sent; s."""
    bits = problem.least_bits + jnp.sum(share * problem.step_bits, -1)
    allocation = min_max_latency(bits, problem.snr_hz, problem.start_s, problem.band_hz)
    return allocation.latency_s - jnp.sum(share * problem.step_bits * problem.worth)


def _clear(scaled: Scaled, at: Breakpoints, guess: Array) -> tuple[Array, Response]:
    """The logarithm of the price at which the band is used up, and what the clients do at it."""

    def at_price(log_price: Array, before: Response) -> tuple[Array, Array, Response]:
        del before
        response = best_response(scaled, at, jnp.exp(log_price))[0]
        used_hz = jnp.maximum(jnp.sum(response.share_hz), TINY)
        slope = jnp.sum(linearise(response, d_log_price=1.0)[0]) / used_hz
        return jnp.log(used_hz / scaled.band_hz), slope, response

    low, high = at.log_bracket
    blank = jax.tree.map(jnp.zeros_like, best_response(scaled, at, low)[0])
    return newton(at_price, low, high, jnp.clip(guess, low, high), blank, _BAND_TOLERANCE)


def _worth_of_time(response: Response, log_price: Array) -> tuple[Array, Array]:
    """The logarithm of what a second more saves in band, in seconds, and its derivative by the latency."""
    pull = pull_of(response)
    total = jnp.maximum(jnp.sum(pull), TINY)
    by_price, pull_by_price, _ = linearise(response, d_log_price=1.0)
    by_time, pull_by_time, _ = linearise(response, d_upload=1.0)
    d_log_price = -jnp.sum(by_time) / jnp.minimum(jnp.sum(by_price), -TINY)
    slope = d_log_price + jnp.sum(pull * (pull_by_time + pull_by_price * d_log_price)) / total
    return log_price + jnp.log(total), slope


@sent_share.defjvp
def _sent_share_jvp(primals: tuple[Problem], tangents: tuple[Problem]) -> tuple[Array, Array]:
    """Implicit: the conditions are linear in the changes of log price and latency, two equations for two unknowns."""
    (problem,), (d_problem,) = primals, tangents
    share = sent_share(problem)
    bits = problem.least_bits + jnp.sum(share * problem.step_bits, -1)
    share_hz = min_max_latency(bits, problem.snr_hz, problem.start_s, problem.band_hz).bandwidth_hz
    step = (share > 0) & (share < 1) & (problem.step_bits > 0)
    active, inside = bits > 0, step.any(-1)
    safe_hz = jnp.where(active, share_hz, 1.0)
    response = Response(
        active=active,
        inside=inside,
        bits=bits,
        upload_s=jnp.where(active, bits / jnp.maximum(uplink_rate(safe_hz, problem.snr_hz), TINY), 1.0),
        share_hz=share_hz,
        snr_hz=problem.snr_hz,
        by_band=jnp.maximum(marginal_rates(safe_hz, problem.snr_hz)[0], MIN_SLOPE),
    )
    worth = jnp.where(step, problem.worth, 0.0).sum(-1)
    d_worth = jnp.where(step, d_problem.worth, 0.0).sum(-1)
    held = d_problem.least_bits + jnp.sum(share * d_problem.step_bits, -1)
    of_data = {
        "d_upload": -d_problem.start_s,
        "d_log_worth": d_worth / jnp.where(inside, worth, 1.0),
        "d_bits": held,
        "d_snr": d_problem.snr_hz,
    }
    pull = pull_of(response)
    weight = pull / jnp.maximum(jnp.sum(pull), TINY)

    def misses(changes: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        d_share, d_log_pull, _ = changes
        return jnp.sum(d_share) / problem.band_hz, jnp.sum(weight * d_log_pull)

    by_price, by_time = linearise(response, d_log_price=1.0), linearise(response, d_upload=1.0)
    data = linearise(response, **of_data)
    (a, c), (b, d) = misses(by_price), misses(by_time)
    c += 1.0
    band, time = misses(data)
    band -= d_problem.band_hz / problem.band_hz
    determinant = a * d - b * c
    safe = jnp.where(jnp.abs(determinant) > TINY, determinant, jnp.inf)
    d_log_price, d_latency = (b * time - d * band) / safe, (c * band - a * time) / safe
    d_bits = data[2] + by_price[2] * d_log_price + by_time[2] * d_latency
    d_share = jnp.where(step, (d_bits - held)[:, None] / jnp.where(step, problem.step_bits, 1.0), 0.0)
    return share, d_share
