"""Sets of devices against brute force over all of them in float64, and their laws."""

import functools
import itertools

import jax
import numpy as np
import pytest

from fedjax_lora.control.solver import device_sets
from fedjax_lora.control.solver.device_sets import Demand
from oracles import wireless_oracle

DEVICES, CASES = 7, 60  # of each call, so that a function is compiled once
least_times = jax.jit(jax.vmap(device_sets.least_times))
least_time_of = jax.jit(jax.vmap(device_sets.least_time_of))
best_equal = jax.jit(jax.vmap(device_sets.best_equal))
best_weighted = jax.jit(jax.vmap(device_sets.best_weighted))


def random_case(seed, devices=DEVICES):
    """Demand, band, price, gain of each and gains of all, over decades.

    Half of the cases share no time, half have one line, some devices are not able, and a tenth of the lines has no
    bits. In time, a gain is worth a tenth to ten times a device's part of the time that half of the devices take on
    equal parts of the band.
    """
    rng = np.random.default_rng((seed, devices))
    lines = np.array([True, seed // 2 % 2 > 0])

    def decades(low, high, *shape):
        return np.float32(10 ** rng.uniform(low, high, shape))

    demand = Demand(
        start_s=decades(-3, rng.uniform(-2, 1), devices, 2),
        shared_s=decades(-4, rng.uniform(-3, 0.5), devices) * np.float32(seed % 2),
        bits=decades(rng.uniform(4, 7), 7.5, devices, 2) * (lines & (rng.random((devices, 2)) > 0.1)),
        snr_hz=decades(5, 10, devices),
        able=rng.random(devices) > 0.15,
    )
    band, price = decades(5, 7.5), decades(-3, 3)
    half = np.array([(devices + 1) // 2])
    typical_s = np.median(ends(demand, np.full((1, devices), band / half), half)) / half[0]
    gain = price * decades(-1, 1) * np.float32(typical_s)
    return demand, band, price, gain, gain * decades(-0.7, 0.7, devices)


def called(function, cases):
    """What a function of a batch gives for each of up to CASES cases, in NumPy."""
    full = (list(cases) * CASES)[:CASES]
    return rows(function(*jax.tree.map(lambda *x: np.stack(x), *full)))[: len(cases)]


def rows(tree):
    """The entries of a batch, one by one, in NumPy."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]


def needed(rate_bps, snr_hz):
    """Float64 `required_bandwidth`: Newton's method for `y = log1p(c/b)`, where `expm1(y) / y` is ceiling over rate."""
    rate_nats = rate_bps * np.log(2.0)
    possible = (rate_nats > 0) & (rate_nats < snr_hz)
    ratio = np.log(np.where(possible, snr_hz, np.e) / np.where(possible, rate_nats, 1.0))
    y = 2.0 * ratio  # beyond the root, of a function that rises and is convex
    for _ in range(7):
        y = y - (np.log(np.expm1(y) / y) - ratio) / (1.0 / -np.expm1(-y) - 1.0 / y)
    return np.where(possible, rate_nats / y, np.where(rate_nats > 0, np.inf, 0.0))


def earliest(demand, number):
    """`[S, K, J]` float64 for `number` `[S]` devices."""
    return np.float64(demand.start_s) + number[:, None, None] * np.float64(demand.shared_s)[:, None]


def ends(demand, share_hz, number):
    """`[S, K]` float64 ends of the devices on shares `[S, K]`, which may be 0 where there are no bits."""
    share_hz = np.where(share_hz > 0, np.float64(share_hz), 1e-200)
    rate_bps = share_hz * np.log1p(np.float64(demand.snr_hz) / share_hz) / np.log(2.0)
    times = earliest(demand, number) + np.float64(demand.bits) / np.maximum(rate_bps, 1e-250)[..., None]
    return np.where(demand.bits > 0, times, 0.0).max(-1)


def all_sets(demand, band):
    """All sets `[S, K]` of able devices and their least times `[S]` in float64, by bisection; the empty set first."""
    options = [(False, True) if able else (False,) for able in demand.able]
    masks = np.array(list(itertools.product(*options)))
    number = masks.sum(1)
    whole, split = (np.broadcast_to(x[:, None], masks.shape) for x in (0 * number + band, band / np.maximum(number, 1)))
    low, high = (np.where(masks, ends(demand, share, number), 0.0).max(1) for share in (whole, split))
    begin, bits, snr_hz = earliest(demand, number), np.float64(demand.bits), np.float64(demand.snr_hz)
    for _ in range(34):
        middle = 0.5 * (low + high)
        left = middle[:, None, None] - begin
        rate = np.where(bits > 0, np.where(left > 0, bits / np.where(left > 0, left, 1.0), np.inf), 0.0).max(-1)
        fits = np.where(masks, needed(rate, snr_hz), 0.0).sum(1) <= band
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return masks, high


def gap(found, best, scale):
    """How far a value lies above the best, in parts of the terms that it is the difference of."""
    return (float(found) - best) / scale if scale > 0 else abs(float(found))


def check_shares(chosen, demand, band):
    """In float64 at the float32 answer: the latency is that of the set on its shares, which use up the band."""
    mask, share = chosen.mask, np.float64(chosen.share_hz)
    assert all(np.isfinite(x).all() for x in chosen)
    assert not (mask & ~demand.able).any()
    np.testing.assert_array_equal(share[~mask], 0)
    sends = mask & (demand.bits > 0).any(1)
    assert (share[sends] > 0).all()
    np.testing.assert_allclose(share.sum(), band if sends.any() else 0, rtol=1e-6)
    latency = np.where(mask, ends(demand, share, np.array([mask.sum()]))[0], 0).max(initial=0)
    np.testing.assert_allclose(chosen.latency_s, latency, rtol=1e-6)


def compare(seeds, devices):
    """Brute force over all sets, against all four functions: the gaps of unequal gains, and the numbers chosen."""
    cases = [random_case(seed, devices) for seed in seeds]
    times = called(least_times, [case[:2] for case in cases])
    equal = called(best_equal, [case[:4] for case in cases])
    same = called(best_weighted, [(*case[:3], np.full(devices, case[3])) for case in cases])
    weighted = called(best_weighted, [(*case[:3], case[4]) for case in cases])
    alone = called(least_time_of, [(case[0], own.mask, case[1]) for case, own in zip(cases, weighted, strict=True)])
    gaps = []
    for index, (demand, band, price, gain, gains) in enumerate(cases):
        masks, least = all_sets(demand, np.float64(band))
        number, cost = masks.sum(1), np.float64(price) * least
        best = [least[number == n].min(initial=np.inf) for n in range(1, devices + 1)]
        np.testing.assert_allclose(times[index], best, rtol=1e-6, err_msg=str(index))

        one, own, lead = equal[index], weighted[index], np.float64(gain) * number
        lowest = np.argmin(cost - lead)
        assert abs(gap(one.objective, cost[lowest] - lead[lowest], cost[lowest] + lead[lowest])) < 4e-7, index
        scale = float(price * one.latency_s + gain * one.mask.sum())
        assert gap(same[index].objective, float(one.objective), scale) < 1e-6, index

        lead = masks @ np.float64(gains)
        lowest = np.argmin(cost - lead)
        gaps.append(gap(own.objective, cost[lowest] - lead[lowest], cost[lowest] + lead[lowest]))
        mine = least[(masks == own.mask).all(1)][0]
        np.testing.assert_allclose([own.latency_s, alone[index][0]], mine, rtol=1e-6, err_msg=str(index))
        np.testing.assert_allclose(alone[index][1], own.share_hz, rtol=1e-6)
        for chosen in (one, own):
            check_shares(chosen, demand, band)
    return np.array(gaps), np.array([one.mask.sum() for one in equal])


def test_needed_band_of_the_oracle_is_that_of_bisection():
    """Newton's method against the bisection of `wireless_oracle`, from far below the ceiling to close to it."""
    snr_hz = 10.0 ** np.arange(4, 11)[:, None]
    rate_bps = snr_hz / np.log(2.0) * np.array([1e-8, 1e-5, 1e-2, 0.3, 0.9, 0.999])
    bisected = wireless_oracle.required_bandwidth(rate_bps, snr_hz)
    np.testing.assert_allclose(needed(rate_bps, snr_hz), bisected, rtol=1e-9)
    assert needed(0.0, 1.0) == 0 and needed(1.45, 1.0) == np.inf


def test_brute_force_finds_no_better_set():
    """All sets of 7 devices in float64: equal gains exactly, unequal ones nearly.

    Gaps are in parts of price times latency plus gains. With equal gains 2,940 other cases had none beyond 2e-7, with
    unequal ones a single case had, of 0.045; of 60 cases of 12 devices one, of 0.053.
    """
    gaps, numbers = compare(range(CASES), DEVICES)
    assert (numbers == 0).any() and (numbers == 1).any() and (numbers > 3).any()
    assert gaps.min() > -1e-6 and np.median(gaps) < 1e-6 and gaps.max() < 0.1 and gaps.mean() < 3e-3


@pytest.mark.parametrize("function", ["equal", pytest.param("weighted", marks=pytest.mark.slow)])
def test_no_more_devices_than_a_round_has_places(function):
    """Brute force over the sets of at most two of five devices; with unequal gains the limit and the latency."""
    chosen = {"equal": device_sets.best_equal, "weighted": device_sets.best_weighted}[function]
    cases = [random_case(seed, 5) for seed in range(20)]
    few = jax.jit(jax.vmap(functools.partial(chosen, most=2)))
    given = [(*case[:3], case[3] if function == "equal" else case[4]) for case in cases]
    for (demand, band, price, gain, _), one in zip(cases, called(few, given), strict=True):
        check_shares(one, demand, band)
        assert one.mask.sum() <= 2
        masks, least = all_sets(demand, np.float64(band))
        cost, lead = (x[masks.sum(1) <= 2] for x in (np.float64(price) * least, np.float64(gain) * masks.sum(1)))
        lowest = np.argmin(cost - lead)
        if function == "equal":
            assert abs(gap(one.objective, cost[lowest] - lead[lowest], cost[lowest] + lead[lowest])) < 4e-7


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3, 8, 10])
def test_brute_force_over_more_cases_finds_no_better_set(devices):
    """As above, 540 cases in all of up to 10 devices."""
    for first in (1000, 1060, 1120):
        gaps, _ = compare(range(first, first + CASES), devices)
        assert gaps.min() > -1e-6 and np.median(gaps) < 1e-6 and gaps.max() < 0.1 and gaps.mean() < 3e-3


def test_one_line_without_shared_time_is_the_least_latency_of_uploads():
    """`wireless_oracle.min_max_latency` by Brent's method, for who is able; one line is as two, one without bits."""
    one = jax.jit(device_sets.least_time_of)
    for seed in (0, 4, 8):
        demand, band, *_ = random_case(seed)
        sends = demand.able & (demand.bits[:, 0] > 0)
        radio = demand.bits[sends, 0], demand.snr_hz[sends], demand.start_s[sends, 0]
        best, shares = wireless_oracle.min_max_latency(*radio, np.float64(band))
        single = demand._replace(start_s=demand.start_s[:, :1], bits=demand.bits[:, :1])
        ((latency, found),) = called(least_time_of, [(demand, sends, band)])
        for latency_s, share_hz in ((latency, found), one(single, sends, band)):
            np.testing.assert_allclose(latency_s, best, rtol=1e-6)
            np.testing.assert_allclose(np.asarray(share_hz)[sends], shares, rtol=1e-3, atol=1e-6 * band)


@pytest.mark.parametrize("function", ["best_equal", "best_weighted"])
def test_prices_map_and_each_decides_as_alone(function):
    """vmap over prices alone equals single calls, and the latency falls with the price."""
    demand, band, price, gain, gains = random_case(3)
    prices = price * np.float32([0.0, 0.01, 0.3, 1.0, 3.0, 100.0])
    alone, worth = (best_equal, gain) if function == "best_equal" else (best_weighted, gains)
    mapped = rows(jax.jit(jax.vmap(getattr(device_sets, function), (None, None, 0, None)))(demand, band, prices, worth))
    for row, each in zip(mapped, called(alone, [(demand, band, each, worth) for each in prices]), strict=True):
        for many, one in zip(row, each, strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-5)
    latency = [row.latency_s for row in mapped]
    assert all(np.diff(latency) <= 1e-6 * latency[0]) and latency[-1] < latency[0]


def test_the_program_of_one_case_is_that_of_a_batch():
    """Without vmap: the same choice."""
    for case in (random_case(1), random_case(6)):
        (batched,) = called(best_equal, [case[:4]])
        for many, one in zip(batched, jax.jit(device_sets.best_equal)(*case[:4]), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.parametrize("weird", ["nobody", "no gain", "no price", "free", "no band", "unheard", "no bits"])
def test_extremes_are_finite(weird):
    """By definition: nobody takes no time, who is free takes part, and what is worth nothing does not."""
    demand, band, price, gain, gains = random_case(5)
    able, none = np.arange(DEVICES) > 0, np.zeros(DEVICES, bool)
    demand = demand._replace(able=none if weird == "nobody" else able, bits=demand.bits + np.float32(1e4))
    demand = demand._replace(bits=0 * demand.bits) if weird == "no bits" else demand
    unheard = demand._replace(snr_hz=0 * demand.snr_hz, start_s=np.inf * demand.start_s)
    demand = unheard if weird == "unheard" else demand
    band = np.float32(0) if weird == "no band" else band
    price = np.float32(0) if weird in ("no price", "free") else price
    gain, gains = (np.float32(0), 0 * gains) if weird in ("no gain", "free") else (gain, gains)
    for function, worth in ((best_equal, gain), (best_weighted, gains)):
        (chosen,) = called(function, [(demand, band, price, worth)])
        np.testing.assert_array_equal(chosen.mask, able if weird in ("no price", "free", "no bits") else none)
        assert (chosen.latency_s > 0) == (weird in ("no price", "free"))
        check_shares(chosen, demand, band)
    (times,) = called(least_times, [(demand, band)])
    count = 0 if weird in ("nobody", "no band", "unheard") else able.sum()
    assert np.isfinite(times[:count]).all() and (times[count:] == np.inf).all()
    ((latency, shares),) = called(least_time_of, [(demand, none, band)])
    assert latency == 0 and not shares.any()


@pytest.mark.parametrize("field", Demand._fields)
def test_shapes_are_checked(field):
    demand, band, *_ = random_case(0)
    demand = demand._replace(**{field: getattr(demand, field)[1:]})
    with pytest.raises(ValueError, match=r"^start_s and bits must be \[K, J\], shared_s, snr_hz and able \[K\], got"):
        device_sets.least_times(demand, band)
