"""Random cohorts for TSFA's round, in NumPy alone: a seed is an instance."""

import numpy as np

CLIENTS, RANKS = 6, 8
BAND = 2e7


def tails(energies):
    """Tail energies `[K, R + 1]` of energies `[K, R]`, sorted."""
    ordered = np.sort(energies, -1)
    return np.concatenate([np.cumsum(ordered, -1)[:, ::-1], np.zeros((len(energies), 1))], -1)


def random_case(seed, left_out=True):
    """A cohort of six: payloads over two decades, gains over five (some at their ceiling), late starts, and V over
    five decades; in most, some clients are absent, have nothing to send, or cannot be heard."""
    rng = np.random.default_rng(seed)
    bits, snr = 10 ** rng.uniform(5, 7, CLIENTS), 10 ** rng.uniform(5.5, 11, CLIENTS)
    start = rng.uniform(0, 10 ** rng.uniform(-1, 0.5), CLIENTS)
    weights = rng.dirichlet(np.ones(CLIENTS))
    if left_out:
        for column in (bits, snr, weights):
            column[rng.random(CLIENTS) < 0.1] = 0.0
    energies = rng.exponential(1, (CLIENTS, RANKS)) ** rng.uniform(0.3, 3)
    queue, V = 10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-2, 3)
    args = bits, snr, start, BAND, weights, tails(energies), queue, V
    return tuple(np.float32(x) for x in args)


def able(case):
    bits, snr, _, _, weights, *_ = case
    return (bits > 0) & (snr > 0) & (weights > 0)


def steps(case, least=1):
    """What the oracle takes, of those who can send: seconds of latency are the unit."""
    bits, snr, start, _, weights, tail, queue, V = (np.float64(x) for x in case)
    who = able(case)
    step = np.repeat(bits[:, None] / RANKS, RANKS - least, 1)
    gain = V / queue * weights[:, None] * -np.diff(tail)[:, least:]
    return bits[who] * least / RANKS, step[who], gain[who], snr[who], start[who], BAND
