"""Shares of least energy against bisection in float64, and sets against brute force over all of them."""

import itertools

import jax
import numpy as np
import pytest

from fedjax_lora.control.solver import device_energy
from fedjax_lora.control.solver.device_energy import Costs

DEVICES = 6
least_energy = jax.jit(jax.vmap(device_energy.least_energy))
best_by_energy = jax.jit(jax.vmap(device_energy.best_by_energy))


def random_case(seed):
    """Costs over decades, band, power, price and gains of about what a device costs."""
    rng = np.random.default_rng(seed)

    def decades(low, high, *shape):
        return np.float32(10 ** rng.uniform(low, high, shape))

    costs = Costs(
        own_j=decades(-4, -1, DEVICES),
        bits=decades(5, 7, DEVICES) * (rng.random(DEVICES) > 0.1),
        snr_hz=decades(5, 10, DEVICES),
        able=rng.random(DEVICES) > 0.15,
    )
    band_hz, power_w = decades(5, 7.5), decades(-2, -0.5)
    each = np.full(DEVICES, band_hz / DEVICES)
    typical_j = np.median(costs.own_j + power_w * costs.bits / rate(each, costs.snr_hz))
    return costs, band_hz, power_w, np.float32(1.0), np.float32(typical_j) * decades(-0.7, 0.7, DEVICES)


def rate(share_hz, snr_hz):
    """Float64 bit/s."""
    share_hz = np.maximum(np.float64(share_hz), 1e-12)
    return share_hz * np.log1p(np.float64(snr_hz) / share_hz) / np.log(2.0)


def energies(costs, masks, band_hz, power_w):
    """`[S]` float64 joules of sets `[S, K]`, by bisection of the price of a hertz, and of each share for a price."""
    sends = masks & (costs.bits > 0)
    bits, snr_hz = np.float64(np.where(costs.bits > 0, costs.bits, 1.0)), np.float64(costs.snr_hz)

    def shares(log_price):
        low, high = np.full(masks.shape, -20.0), np.full(masks.shape, 25.0)
        for _ in range(45):
            middle = 0.5 * (low + high)
            y = snr_hz / np.exp(middle)
            slope = (np.log1p(y) - y / (1 + y)) / np.log(2.0)
            more = np.log(bits * slope) - 2 * np.log(rate(np.exp(middle), snr_hz)) > log_price[:, None]
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return np.where(sends, np.exp(0.5 * (low + high)), 0.0)

    low, high = np.full(len(masks), -60.0), np.full(len(masks), 60.0)
    for _ in range(50):
        middle = 0.5 * (low + high)
        too_much = shares(middle).sum(-1) > band_hz
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    found = shares(0.5 * (low + high))
    found *= float(band_hz) / np.maximum(found.sum(-1, keepdims=True), 1e-30)
    upload_s = np.where(sends, bits / rate(found, snr_hz), 0.0)
    return np.sum(np.where(masks, np.float64(costs.own_j), 0.0) + float(power_w) * upload_s, -1)


CASES = [random_case(seed) for seed in range(20)]


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def test_shares_of_least_energy_are_those_of_float64():
    """Oracle: bisection in NumPy. The shares fill the band, and no able device that sends is without."""
    costs, band_hz, power_w = (stacked(part) for part in zip(*(case[:3] for case in CASES), strict=True))
    found, share_hz = least_energy(costs, costs.able, band_hz, power_w)
    for number, (own, band, power, _, _) in enumerate(CASES):
        np.testing.assert_allclose(found[number], energies(own, own.able[None], band, power)[0], rtol=2e-4)
        sends = own.able & (own.bits > 0)
        assert (np.asarray(share_hz[number] > 0) == sends).all()
        np.testing.assert_allclose(share_hz[number].sum(), band if sends.any() else 0.0, rtol=1e-5)


def test_the_chosen_set_is_near_brute_force():
    """Oracle: all 2^6 sets in float64. The best set is found nearly always; the gap of the others is small."""
    found, gaps = best_by_energy(*(stacked(part) for part in zip(*CASES, strict=True))), []
    sets = np.array(list(itertools.product([False, True], repeat=DEVICES)))
    for number, (costs, band, power, price, gains) in enumerate(CASES):
        worth = float(price) * energies(costs, sets, band, power) - sets @ np.float64(gains)
        worth = np.where((sets & ~costs.able).any(-1), np.inf, worth)
        own = worth[(sets == np.asarray(found.mask[number])).all(-1)][0]
        gaps.append((own - worth.min()) / np.sum(np.float64(gains)))
    gaps = np.array(gaps)
    assert (gaps < 1e-3).mean() >= 0.9 and gaps.max() < 0.05, gaps


@pytest.mark.parametrize("most", [0, 2])
def test_no_more_devices_than_are_allowed(most):
    costs, band, power, price, gains = random_case(3)
    found = device_energy.best_by_energy(costs, band, power, price, 1e6 * gains, most)
    assert int(found.mask.sum()) == most
