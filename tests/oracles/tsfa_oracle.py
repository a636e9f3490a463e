"""TSFA's round in float64 without multipliers: every step cut into slivers, the band spent on the best ones first.

For a given latency each client's need of band is convex in what it sends and its gain is concave, so that taking the
slivers by gain for the band, best first, is the fractional knapsack's optimum. The latency is a plain search.
"""

import numpy as np
from scipy import interpolate, optimize

from oracles.wireless_oracle import min_max_latency

_SNR = np.exp(np.linspace(np.log(1e12), np.log(1e-7), 20_000))
_LOAD = np.log1p(_SNR) / _SNR
_IDLE = np.where(_SNR > 1e-3, 1 - _LOAD, _SNR / 2 - _SNR**2 / 3 + _SNR**3 / 4)
_BAND = interpolate.CubicSpline(np.log(_LOAD / _IDLE), -np.log(_SNR))


def band(bits, snr_hz, upload_s):
    """Band that carries the bits in time, inf where none does: from samples of the rate, turned around."""
    load = bits * np.log(2) / snr_hz / upload_s
    possible = (load > 0) & (load < 1 - 1e-7)
    safe = np.where(possible, load, 0.5)
    found = snr_hz * np.exp(_BAND(np.log(safe / (1 - safe))))
    return np.where(possible, found, np.where(load > 0, np.inf, 0.0))


def spend(latency_s, least, step, gain, snr_hz, start_s, bandwidth_hz, slivers=100):
    """Gain of the best slivers within a latency; None where the least does not fit."""
    sent = least[:, None] + np.cumsum(np.repeat(step / slivers, slivers, 1), 1)
    upload_s = (latency_s - start_s)[:, None]
    if (upload_s <= 0).any():
        return None
    needed = band(np.concatenate([least[:, None], sent], 1), snr_hz[:, None], upload_s)
    left = bandwidth_hz - needed[:, 0].sum()
    if not left >= 0:
        return None
    with np.errstate(invalid="ignore"):
        cost = np.diff(needed, axis=1)
    worth = np.repeat(gain / slivers, slivers, 1)
    usable = np.isfinite(cost)
    cost, worth = cost[usable], worth[usable]
    free = cost <= 0
    order = np.argsort(-worth[~free] / cost[~free], kind="stable")
    cost, worth, total = cost[~free][order], worth[~free][order], worth[free].sum()
    before = np.concatenate([[0.0], np.cumsum(cost)[:-1]])
    return total + np.sum(worth * np.clip((left - before) / cost, 0, 1))


def solve(least, step, gain, snr_hz, start_s, bandwidth_hz, points=300):
    """Least `latency + what is not gained`, in seconds, and its latency, over all clients `[K]` (each can send)."""
    args = [np.asarray(x, np.float64) for x in (least, step, gain, snr_hz, start_s)]
    least, step, gain, snr_hz, start_s = args
    low = min_max_latency(least, snr_hz, start_s, bandwidth_hz)[0]
    high = min_max_latency(least + step.sum(1), snr_hz, start_s, bandwidth_hz)[0]

    def objective(latency_s):
        gained = spend(latency_s, least, step, gain, snr_hz, start_s, bandwidth_hz)
        return np.inf if gained is None else latency_s + gain.sum() - gained

    grid = low * (1 + 1e-9) + (high - low) * np.linspace(0, 1, points) ** 2
    values = np.array([objective(x) for x in grid])
    padded = np.concatenate([[np.inf], values, [np.inf]])
    valleys = np.flatnonzero((values <= padded[:-2]) & (values <= padded[2:]))
    best = min(zip(values, grid, strict=True))
    for valley in sorted(valleys, key=lambda i: values[i])[:4]:
        bounds = grid[max(valley - 1, 0)], grid[min(valley + 1, points - 1)]
        if bounds[1] > bounds[0]:
            options = {"xatol": 1e-7 * high}
            found = optimize.minimize_scalar(objective, bounds=bounds, method="bounded", options=options)
            best = min(best, (found.fun, found.x))
    return best
