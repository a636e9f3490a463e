"""Rates and least latency in float64, by bisection: slow, plain and apart from the implementation."""

import numpy as np
from scipy import optimize


def rate(bandwidth_hz, snr_hz):
    return bandwidth_hz * np.log1p(snr_hz / bandwidth_hz) / np.log(2.0)


def required_bandwidth(rate_bps, snr_hz):
    """Bisection of log b, elementwise; the rate must be under the ceiling."""
    low, high = np.full(np.shape(rate_bps), -30.0), np.full(np.shape(rate_bps), 60.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        enough = rate(np.exp(middle), snr_hz) >= rate_bps
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.exp(0.5 * (low + high))


def min_max_latency(bits, snr_hz, start_s, bandwidth_hz):
    """Latency and shares by Brent's method on log(latency - bound); all clients must be able to send."""
    bits, snr_hz, start_s = (np.asarray(x, np.float64) for x in (bits, snr_hz, start_s))
    bound = np.max(start_s + bits * np.log(2.0) / snr_hz)

    def shares(log_excess):
        return required_bandwidth(bits / (bound + np.exp(log_excess) - start_s), snr_hz)

    equal = np.max(start_s + bits / rate(bandwidth_hz / bits.size, snr_hz))
    alone = np.max(start_s + bits / rate(bandwidth_hz, snr_hz))
    low, high = np.log(alone - bound) - 1e-3, np.log(equal - bound) + 1e-3
    root = optimize.brentq(lambda x: np.log(shares(x).sum() / bandwidth_hz), low, high, xtol=1e-12)
    return bound + np.exp(root), shares(root)
