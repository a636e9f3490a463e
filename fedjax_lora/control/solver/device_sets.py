"""Which devices take part in a round of split training, and on which parts of the band.

A device k among n that take part ends at `max_j start_kj + n shared_k + bits_kj / r(b_k)`, so that it needs the band
`b_k(tau; n)` to end by tau: the more take part, the later each can begin. All functions are of arrays alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from fedjax_lora.wireless.rate import required_bandwidth, uplink_rate

_NEVER_S = 1e15  # as `min_max_latency` has it
_TOLERANCE = 5e-7  # of a time, a few roundings of float32
_EVALUATIONS = 60  # of a search, at most
_MULTIPLES = (1.0, 1.3, 2.0)  # of the least times, as candidates
_FLIPS = 3
_LEAST_HZ = 1e-9


class Demand(NamedTuple):
    """What the devices have to send, when, and over which channels. A line without bits counts for nothing.

    start_s: `[K, J]` s >= 0, when the upload of each line can begin, without what `shared_s` adds.
    shared_s: `[K]` seconds by which every device that takes part, itself among them, delays the device.
    bits: `[K, J]` payload of each line, >= 0.
    snr_hz: `[K]` received power over noise density p·g/N0, Hz.
    able: `[K]` bool, who may take part.
    """

    start_s: Array
    shared_s: Array
    bits: Array
    snr_hz: Array
    able: Array


class Chosen(NamedTuple):
    """A set of devices and its shares.

    mask: `[K]` bool, who takes part. share_hz: `[K]` parts of the band, 0 for who does not or has nothing to send.
    latency_s: scalar, when the last one ends on these shares; 0 for the empty set.
    objective: scalar, price of the latency less the gains of the set.
    """

    mask: Array
    share_hz: Array
    latency_s: Array
    objective: Array


def least_times(demand: Demand, band_hz: ArrayLike) -> Array:
    """`[K]` s in which the best set of 1 ... K devices can end, exact to float32; inf where fewer are able."""
    return _least_times(*_clean(demand, band_hz))


def least_time_of(demand: Demand, mask: Array, band_hz: ArrayLike) -> tuple[Array, Array]:
    """Least time of the able ones of a set `[K]`, scalar, and their shares `[K]`; 0 and zeros for an empty one."""
    demand, band_hz = _clean(demand, band_hz)
    mask = mask & demand.able
    return _shares(demand, mask, _time_of(demand, mask, band_hz), band_hz)


def best_equal(
    demand: Demand, band_hz: ArrayLike, price: ArrayLike, gain: ArrayLike, most: int | None = None
) -> Chosen:
    """Minimise `price latency - gain n` over sets of n <= `most` devices and shares of the band: exact to float32.

    Price of a second and gain of a device are scalars >= 0. With price 0 all that are able take part. The objective
    is a difference, and so to rounding of its larger term.
    """
    demand, band_hz = _clean(demand, band_hz)
    times_s, masks = _sets_by_number(demand, band_hz)
    times_s = jnp.where(masks.sum(-1) > _limit(demand, most), jnp.inf, times_s)
    gains = jnp.asarray(gain, jnp.float32) * jnp.arange(times_s.size - 1, -1, -1)
    best = jnp.argmin(_objective(times_s, price, gains))
    latency_s, share_hz = _shares(demand, masks[best], times_s[best], band_hz)
    return Chosen(masks[best], share_hz, latency_s, _objective(latency_s, price, gains[best]))


def best_weighted(
    demand: Demand, band_hz: ArrayLike, price: ArrayLike, gains: Array, most: int | None = None
) -> Chosen:
    """Minimise `price latency - sum of gains` over sets of at most `most` devices and shares of the band: a heuristic.

    Candidates are the best sets of each size, those of the largest gains, and for several times devices by gain over
    needed band as long as they fit. The best one then changes by single devices while that helps, a few times. With
    equal gains `[K]` it is no worse than `best_equal`. It compiles for longer and takes about ten times as long.
    """
    demand, band_hz = _clean(demand, band_hz)
    gains = jnp.where(demand.able, jnp.asarray(gains, jnp.float32), 0.0)

    def evaluate(mask: Array) -> Array:
        time_s = jnp.where(mask.sum() > _limit(demand, most), jnp.inf, _time_of(demand, mask, band_hz))
        return _objective(time_s, price, jnp.sum(jnp.where(mask, gains, 0.0)))

    times_s, by_number = _sets_by_number(demand, band_hz)
    times_s = jnp.where(by_number.sum(-1) > _limit(demand, most), jnp.inf, times_s)
    by_gain = (jnp.argsort(jnp.argsort(-gains)) <= jnp.arange(gains.size)[:, None]) & demand.able
    candidates = jnp.concatenate([by_gain, _sets_by_density(demand, band_hz, times_s[:-1], gains)])
    worth = _objective(times_s, price, jnp.sum(jnp.where(by_number, gains, 0.0), -1))
    worth = jnp.concatenate([worth, jax.vmap(evaluate)(candidates)])
    best = jnp.argmin(worth)
    found = jnp.concatenate([by_number, candidates])[best], worth[best]
    mask, _ = lax.fori_loop(0, _FLIPS, lambda _, found: flip_one(evaluate, demand.able, *found), found)
    latency_s, share_hz = _shares(demand, mask, _time_of(demand, mask, band_hz), band_hz)
    return Chosen(mask, share_hz, latency_s, _objective(latency_s, price, jnp.sum(jnp.where(mask, gains, 0.0))))


def _limit(demand: Demand, most: int | None) -> int:
    """The most devices of a set."""
    return demand.able.size if most is None else most


def _clean(demand: Demand, band_hz: ArrayLike) -> tuple[Demand, Array]:
    """The same in float32, with harmless values for lines without bits and for who cannot send them."""
    start_s, shared_s, bits, snr_hz, band_hz = (jnp.asarray(x, jnp.float32) for x in (*demand[:4], band_hz))
    shapes = [x.shape for x in (start_s, bits, shared_s, snr_hz, demand.able)]
    if shapes != [bits.shape] * 2 + [bits.shape[:1]] * 3 or bits.ndim != 2:
        raise ValueError(f"start_s and bits must be [K, J], shared_s, snr_hz and able [K], got {shapes}")
    sends = bits > 0
    can = (bits < _NEVER_S * snr_hz[:, None]) & (start_s < _NEVER_S) & (shared_s[:, None] < _NEVER_S) & (band_hz > 0)
    able = demand.able & jnp.all(can | ~sends, -1)
    used = sends & able[:, None]
    start_s, bits = jnp.where(used, start_s, 0.0), jnp.where(used, bits, 0.0)
    shared_s, snr_hz = jnp.where(able, shared_s, 0.0), jnp.where(able, snr_hz, 1.0)
    return Demand(start_s, shared_s, bits, snr_hz, able), jnp.where(band_hz > 0, band_hz, 1.0)


def _earliest(demand: Demand, number: Array) -> Array:
    """`[..., K, J]` when the uploads can begin where `number` `[...]` take part."""
    return demand.start_s + (number[..., None] * demand.shared_s)[..., None]


def _needed(demand: Demand, time_s: Array, number: Array) -> Array:
    """`[..., K]` Hz to end by `time_s` `[...]` where `number` `[...]` take part; inf where there is no way to."""
    left_s = time_s[..., None, None] - _earliest(demand, number)
    late, sends = left_s <= 0, demand.bits > 0
    rate_bps = jnp.where(late, jnp.inf, demand.bits / jnp.where(late, 1.0, left_s))
    fastest_bps = jnp.max(jnp.where(sends, rate_bps, 0.0), -1, initial=0.0)
    return jnp.where(demand.able, required_bandwidth(fastest_bps, demand.snr_hz), jnp.inf)


def _ends(demand: Demand, share_hz: Array, number: Array) -> Array:
    """`[..., K]` when a device ends on its share `[..., K]`; inf for who is not able."""
    sends = demand.bits > 0
    rate_bps = uplink_rate(share_hz, demand.snr_hz)[..., None]
    upload_s = demand.bits / jnp.where(rate_bps > 0, rate_bps, 1.0)
    end_s = jnp.where(rate_bps > 0, _earliest(demand, number) + upload_s, jnp.inf)
    return jnp.where(demand.able, jnp.max(jnp.where(sends, end_s, 0.0), -1, initial=0.0), jnp.inf)


def _least_times(demand: Demand, band_hz: Array) -> Array:
    number = jnp.arange(1, demand.able.size + 1)
    # Nobody beats having the whole band, and the equal split is one allocation: they bracket the optimum.
    low_s = _nth_smallest(_ends(demand, jnp.broadcast_to(band_hz, (number.size, 1)), number), number)
    high_s = _nth_smallest(_ends(demand, (band_hz / number)[:, None], number), number)

    def smallest(time_s: Array) -> Array:
        needed_hz = _needed(demand, time_s, number)
        largest_hz = _nth_smallest(needed_hz, number)
        under = needed_hz < largest_hz[:, None]
        return jnp.sum(jnp.where(under, needed_hz, 0.0), -1) + (number - under.sum(-1)) * largest_hz

    return _search(smallest, low_s, high_s, band_hz)


def _time_of(demand: Demand, mask: Array, band_hz: Array) -> Array:
    """Scalar, the least time of a set `[K]` of able devices; 0 for the empty one."""
    number = mask.sum()
    ends_s = _ends(demand, jnp.stack([band_hz, band_hz / jnp.maximum(number, 1)])[:, None], number)
    low_s, high_s = jnp.max(jnp.where(mask, ends_s, 0.0), -1, initial=0.0)

    def together(time_s: Array) -> Array:
        return jnp.sum(jnp.where(mask, _needed(demand, time_s, number), 0.0))

    return _search(together, low_s, high_s, band_hz)


def _search(needed: Callable[[Array], Array], low_s: Array, high_s: Array, band_hz: Array) -> Array:
    """`[...]` least times at which `needed`, of times `[...]` to Hz `[...]` and non-increasing, falls to the band.

    `low_s` are too short or just enough, `high_s` enough; 0 and inf stay.
    """
    is_open = (high_s > 0) & jnp.isfinite(high_s)
    # Ends are apart by some roundings, so that the later one is enough in float32 too.
    low, high = (jnp.where(is_open, end * (1.0 + by), 1.0) for end, by in ((low_s, -1e-6), (high_s, 1e-6)))

    def step(state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        index, bracket = state
        inside_s = _inside(bracket)
        time_s = jnp.where(index == 0, bracket.low, jnp.where(index == 1, bracket.high, inside_s))
        return index + 1, _narrowed(bracket, time_s, jnp.log(needed(time_s) / band_hz), index > 2)

    def unsettled(state: tuple[Array, _Bracket]) -> Array:
        index, bracket = state
        return (index < _EVALUATIONS) & jnp.any(bracket.high > bracket.low * (1.0 + _TOLERANCE))

    bracket = _Bracket(low, high, jnp.inf + low, -jnp.inf + low, jnp.zeros_like(is_open))
    _, bracket = lax.while_loop(unsettled, step, (jnp.int32(0), bracket))
    return jnp.where(is_open, bracket.high, high_s)


class _Bracket(NamedTuple):
    """Times between which a search goes on, the logarithms of need over band there, and which one was the last."""

    low: Array
    high: Array
    at_low: Array
    at_high: Array
    last_fits: Array


def _inside(bracket: _Bracket) -> Array:
    """`[...]` time on the secant, for the logarithms of need and time, which are nearly on a line."""
    low, high, at_low, at_high, _ = bracket
    known = jnp.isfinite(at_low) & jnp.isfinite(at_high)
    part = jnp.where(known, at_low / (at_low - at_high), 0.5)
    # A little off the ends, so that both close in.
    nearest, farthest = low * (1.0 + 0.5 * _TOLERANCE), high * (1.0 - 0.5 * _TOLERANCE)
    return jnp.clip(low * jnp.exp(part * jnp.log(high / low)), nearest, farthest)


def _narrowed(bracket: _Bracket, time_s: Array, excess: Array, weigh: Array) -> _Bracket:
    """The method of Illinois: an end that stays twice counts half."""
    low, high, at_low, at_high, last_fits = bracket
    fits = excess <= 0
    part = jnp.where((fits == last_fits) & weigh, 0.5, 1.0)
    return _Bracket(
        low=jnp.where(fits, low, time_s),
        high=jnp.where(fits, time_s, high),
        at_low=jnp.where(fits, at_low * part, excess),
        at_high=jnp.where(fits, excess, at_high * part),
        last_fits=fits,
    )


def _nth_smallest(values: Array, number: Array) -> Array:
    """`[N]` the `number[i]`-th smallest of row i of `[N, K]`, >= 0, counted from 1.

    Bit by bit, since such floats are in the order of their bits: XLA sorts many short rows far more slowly.
    """
    order = lax.bitcast_convert_type(values, jnp.int32)

    def settle(index: int, found: Array) -> Array:
        trial = found + (jnp.int32(1) << (30 - index))
        return jnp.where(jnp.sum(order < trial[:, None], -1) < number, trial, found)

    found = lax.fori_loop(0, 31, settle, jnp.zeros(values.shape[0], jnp.int32))
    return lax.bitcast_convert_type(found, jnp.float32)


def _sets_by_number(demand: Demand, band_hz: Array) -> tuple[Array, Array]:
    """Least times `[K + 1]` and sets `[K + 1, K]` of K ... 0 devices, the largest first."""
    number = jnp.arange(1, demand.able.size + 1)
    times_s = _least_times(demand, band_hz)
    needed_hz = _needed(demand, jnp.where(jnp.isfinite(times_s), times_s, 0.0), number)
    largest_hz = _nth_smallest(needed_hz, number)[:, None]
    under, equal = needed_hz < largest_hz, needed_hz == largest_hz
    missing = number[:, None] - under.sum(-1, keepdims=True)
    masks = (under | (equal & (jnp.cumsum(equal, -1) <= missing))) & demand.able
    times_s, masks = jnp.pad(times_s, (1, 0)), jnp.pad(masks, ((1, 0), (0, 0)))
    return times_s[::-1], masks[::-1]


def _sets_by_density(demand: Demand, band_hz: Array, times_s: Array, gains: Array) -> Array:
    """`[M K, K]` sets that end by multiples of times `[K]` of K ... 1 devices, filled by gain over needed band."""
    number = jnp.tile(jnp.arange(times_s.size, 0, -1), len(_MULTIPLES))
    times_s = jnp.outer(jnp.array(_MULTIPLES), jnp.where(jnp.isfinite(times_s), times_s, 0.0)).ravel()
    wanted_hz = jnp.where(gains > 0, _needed(demand, times_s, number), jnp.inf)
    order = jnp.argsort(-gains / jnp.maximum(wanted_hz, _LEAST_HZ), -1)

    def take(left: tuple[Array, Array], device: Array) -> tuple[tuple[Array, Array], Array]:
        left_hz, left_number = left
        band = jnp.take_along_axis(wanted_hz, device[:, None], 1)[:, 0]
        taken = (band <= left_hz) & (left_number > 0)
        return (left_hz - jnp.where(taken, band, 0.0), left_number - taken), taken

    # A little more than the band, since at a least time the needs add up to the band but for rounding.
    full_hz = jnp.full_like(times_s, band_hz * (1.0 + 1e-5))
    _, taken = lax.scan(take, (full_hz, number), order.T)
    return jnp.zeros(order.shape, bool).at[jnp.arange(number.size), order.T].set(taken)


def flip_one(evaluate: Callable[[Array], Array], able: Array, mask: Array, worth: Array) -> tuple[Array, Array]:
    """The set `[K]` with the one device more or less that lowers its objective most; the same where none does."""
    changed = (mask ^ jnp.eye(mask.size, dtype=bool)) & able
    candidates = jax.vmap(evaluate)(changed)
    best = jnp.argmin(candidates)
    return jnp.where(candidates[best] < worth, changed[best], mask), jnp.minimum(candidates[best], worth)


def _objective(time_s: Array, price: ArrayLike, gain: Array) -> Array:
    """`[...]` price of times less gains; inf where the time is."""
    possible = jnp.isfinite(time_s)
    return jnp.where(possible, price * jnp.where(possible, time_s, 0.0) - gain, jnp.inf)


def _shares(demand: Demand, mask: Array, time_s: Array, band_hz: Array) -> tuple[Array, Array]:
    """Latency, scalar, and shares `[K]` of a set that can end by `time_s`, scaled up to the whole band."""
    number = mask.sum()
    needed_hz = jnp.where(mask, _needed(demand, time_s, number), 0.0)
    total_hz = needed_hz.sum()
    share_hz = needed_hz * (band_hz / jnp.where(total_hz > 0, total_hz, 1.0))
    return jnp.max(jnp.where(mask, _ends(demand, share_hz, number), 0.0), initial=0.0), share_hz
