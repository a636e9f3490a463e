"""The solvers' problems as CVXPY solves them with Clarabel, in float64.

The allocation and the shares of a set of devices are one convex problem each; the best set is found among all sets.
TSFA's problem is convex at a given latency, inside of SciPy's bounded search around it; written with parameters (DPP)
it was slower and failed at 16 clients.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def tsfa(columns: Sequence[np.ndarray], band_hz: float, V: float, bounds: tuple[float, float]) -> float:
    """The least objective at queue 1, with a search of the latency within bounds; `columns` of `solver_tsfa.cohort`."""
    import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)
    from scipy import optimize

    bits, snr_hz, start_s, weights, tail = (np.asarray(x, np.float64) for x in columns)
    gain = V * weights[:, None] * -np.diff(tail)[:, 1:]
    clients, total, ranks = len(bits), gain.sum(), tail.shape[1] - 1

    def at(latency_s: float) -> float:
        sent = cp.Variable((clients, ranks - 1))
        share = cp.Variable(clients, nonneg=True)  # in units of the equal split
        rank_nats = clients * bits * np.log(2) / band_hz / (latency_s - start_s) / ranks
        needed = rank_nats + cp.multiply(rank_nats, cp.sum(sent, axis=1))
        limits: list[Any] = [_rate(share, snr_hz, band_hz) >= needed, cp.sum(share) <= clients, sent >= 0, sent <= 1]
        problem: Any = cp.Problem(cp.Maximize(cp.sum(cp.multiply(gain / total, sent))), limits)
        problem.solve(solver=cp.CLARABEL)
        return latency_s + total * (1 - problem.value)

    found: Any = optimize.minimize_scalar(at, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(found.fun)


def least_latency(bits: np.ndarray, snr_hz: np.ndarray, start_s: np.ndarray, band_hz: float) -> float:
    """Seconds until the last client ends, on the best shares."""
    import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)

    bits, snr_hz, start_s = (np.asarray(x, np.float64) for x in (bits, snr_hz, start_s))
    clients = len(bits)
    share, latency_s = cp.Variable(clients, nonneg=True), cp.Variable()
    nats = clients * bits * np.log(2) / band_hz
    needed = cp.multiply(nats, cp.inv_pos(latency_s - start_s))
    limits: list[Any] = [_rate(share, snr_hz, band_hz) >= needed, cp.sum(share) <= clients]
    problem: Any = cp.Problem(cp.Minimize(latency_s), limits)
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)


def least_energy(bits: np.ndarray, snr_hz: np.ndarray, band_hz: float, power_w: float) -> float:
    """Joules of sending, on the best shares."""
    import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)

    bits, snr_hz = (np.asarray(x, np.float64) for x in (bits, snr_hz))
    clients = len(bits)
    share = cp.Variable(clients, nonneg=True)
    joules = clients * bits * np.log(2) * power_w / band_hz
    spent = cp.sum(cp.multiply(joules, cp.inv_pos(_rate(share, snr_hz, band_hz))))
    problem: Any = cp.Problem(cp.Minimize(spent), [cp.sum(share) <= clients])
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)


def least_latency_set(columns: Sequence[np.ndarray], band_hz: float, price: float, gains: np.ndarray) -> float:
    """The least `price latency - gains` of all sets; `columns` of `solver_sets.draw`."""
    start_s, shared_s, bits, snr_hz, _, _ = columns

    def objective(taken: list[int]) -> float:
        earliest_s = start_s[taken] + len(taken) * shared_s[taken]
        return price * least_latency(bits[taken], snr_hz[taken], earliest_s, band_hz) - float(gains[taken].sum())

    return min(0.0, *map(objective, _sets(len(bits))))


def least_energy_set(
    columns: Sequence[np.ndarray], band_hz: float, power_w: float, price: float, gains: np.ndarray
) -> float:
    """The least `price energy - gains` of all sets."""
    _, _, bits, snr_hz, own_j, _ = columns

    def objective(taken: list[int]) -> float:
        sending_j = least_energy(bits[taken], snr_hz[taken], band_hz, power_w)
        return float(price * (own_j[taken].sum() + sending_j) - gains[taken].sum())

    return min(0.0, *map(objective, _sets(len(bits))))


def _rate(share: Any, snr_hz: np.ndarray, band_hz: float) -> Any:
    """Nats a second of each share, in units of the equal split's hertz."""
    import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)

    return -cp.rel_entr(share, share + len(snr_hz) * snr_hz / band_hz)


def _sets(devices: int) -> Iterator[list[int]]:
    """Every set of devices but the empty one."""
    every = itertools.product([False, True], repeat=devices)
    return ([i for i, takes in enumerate(mask) if takes] for mask in every if any(mask))
