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


def linear(value_db):
    return 10.0 ** (np.asarray(value_db, np.float64) / 10.0)


def snr_per_gain(numbers):
    """Power over noise density, Hz, from the decibels alone."""
    return linear(numbers["power_dbm"] - 30.0 - (-174.0 - 30.0 + numbers["noise_figure_db"]))


def path_loss(model, distance_m, carrier_ghz, line_of_sight):
    """dB, from the tables of TR 38.901 written out; users at 1.5 m."""
    if model == "3gpp128":
        return 128.1 + 37.6 * np.log10(distance_m / 1e3)
    height_m = {"umi": 10.0, "uma": 25.0}[model]
    slant_m = np.sqrt(distance_m**2 + (height_m - 1.5) ** 2)
    bend_m = 4.0 * (height_m - 1.0) * 0.5 * carrier_ghz * 1e9 / 299_792_458.0
    if model == "umi":
        near = 32.4 + 21.0 * np.log10(slant_m) + 20.0 * np.log10(carrier_ghz)
        far = 32.4 + 40.0 * np.log10(slant_m) + 20.0 * np.log10(carrier_ghz)
        far -= 9.5 * np.log10(bend_m**2 + (height_m - 1.5) ** 2)
        blocked = 35.3 * np.log10(slant_m) + 22.4 + 21.3 * np.log10(carrier_ghz)
    else:
        near = 28.0 + 22.0 * np.log10(slant_m) + 20.0 * np.log10(carrier_ghz)
        far = 28.0 + 40.0 * np.log10(slant_m) + 20.0 * np.log10(carrier_ghz)
        far -= 9.0 * np.log10(bend_m**2 + (height_m - 1.5) ** 2)
        blocked = 13.54 + 39.08 * np.log10(slant_m) + 20.0 * np.log10(carrier_ghz)
    seen = np.where(distance_m <= bend_m, near, far)
    return np.where(line_of_sight, seen, np.maximum(seen, blocked))


def amplitudes(fading, rician_k_db):
    """Steady and scattered amplitude."""
    if fading == "none":
        return 1.0, 0.0
    if fading == "rayleigh":
        return 0.0, 1.0
    ratio = linear(rician_k_db)
    return np.sqrt(ratio / (1 + ratio)), np.sqrt(1 / (1 + ratio))


def known_power(csi, fading, estimate, steady, error):
    """Mean of |h|^2 given what control knows of it; the scattered part has what power the steady one leaves."""
    if csi == "perfect":
        return np.abs(fading) ** 2
    if csi == "mean":
        return np.ones(np.shape(fading))
    return np.abs(steady + np.sqrt(1 - error) * (estimate - steady)) ** 2 + error * (1 - steady**2)
