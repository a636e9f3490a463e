"""Time of TSFA's round, `control.tsfa_online`, and of its continuous problem, beside CVXPY on the same cohorts.

A cohort is drawn as in the default cell: gains over four decades, payloads of 16 ranks, starts within 0.3 s, sorted
exponential tail energies. `round` is what the simulator runs: solve, round to whole ranks, share the band anew.
"""

import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import solver_peers
from solver_timing import timed

from fedjax_lora.control import tsfa_online
from fedjax_lora.core.network import Observation, Radio

RANKS = 16
BAND_HZ = 2e7


def cohort(clients: int, seed: int) -> tuple[np.ndarray, ...]:
    """bits_full, snr_hz, start_s, weights `[K]` and tail_energy `[K, R + 1]`."""
    rng = np.random.default_rng(seed)
    energies = np.sort(rng.exponential(1.0, (clients, RANKS)))
    tail = np.concatenate([np.cumsum(energies, 1)[:, ::-1], np.zeros((clients, 1))], 1)
    columns = (
        np.full(clients, 5e6),
        10 ** rng.uniform(7, 11, clients),
        rng.uniform(0, 0.3, clients),
        rng.dirichlet(np.full(clients, 5.0)),
        tail,
    )
    return tuple(np.asarray(column, np.float32) for column in columns)


def observe(columns: tuple[Any, ...]) -> Observation:
    """What the controller would see of such a cohort."""
    bits, snr_hz, start_s, weights, tail = columns
    return Observation(
        radio=Radio(snr_hz, start_s, band_hz=jnp.float32(BAND_HZ), power_w=jnp.float32(0.01)),
        weights=weights,
        rank=jnp.full(bits.shape, float(RANKS)),
        tail_energy=tail,
        bits=bits[:, None] * jnp.maximum(jnp.arange(RANKS + 1), 1) / RANKS,
    )


def solve(columns: tuple[Any, ...], queue_s: float, V: float) -> tsfa_online.Decision:
    """The continuous problem."""
    bits, snr_hz, start_s, weights, tail = columns
    return tsfa_online.solve(bits, snr_hz, start_s, BAND_HZ, weights, tail, queue_s, V)


def balance(columns: tuple[Any, ...]) -> float:
    """A V at which neither term of the objective is idle: full latency over the mean of the whole energy."""
    full = jax.jit(solve)(columns, 0.0, 1.0).latency_s
    return float(full / np.sum(columns[3] * columns[4][:, 0]))


def measure(clients: int, cases: int, seconds: float) -> dict[str, Any]:
    """The controller's round and `solve` alone, by so many clients."""
    columns = [tuple(map(jnp.asarray, cohort(clients, seed))) for seed in range(cases)]
    V = 3.0 * balance(columns[0])
    controller = tsfa_online.make(tsfa_online.TsfaConfig(V=V))

    def decide(*columns: Any) -> Any:
        return controller.allocate({"queue_s": jnp.float32(1.0)}, observe(columns))

    def continuous(*columns: Any) -> Any:
        return solve(columns, 1.0, V)

    return {"V": V, "round": timed(decide, columns, seconds), "solve": timed(continuous, columns, seconds)}


def beside_cvxpy(clients: int, cases: int, seconds: float) -> dict[str, Any]:
    """Both solvers on the same cohorts: seconds of a call and the relative difference of the objective."""
    columns = [cohort(clients, seed) for seed in range(cases)]
    V = 3.0 * balance(columns[0])

    def continuous(*columns: Any) -> Any:
        return solve(columns, 1.0, V)

    ours = timed(continuous, columns, seconds)
    values = [float(jax.jit(continuous)(*case).objective) for case in columns]
    times, gaps, bound = [], [], jax.jit(solve)
    for case, value in zip(columns, values, strict=True):
        least, full = float(bound(case, 1.0, 0.0).latency_s), float(bound(case, 0.0, 1.0).latency_s)
        started = time.perf_counter()
        best = solver_peers.tsfa(case, BAND_HZ, V, (least * (1 + 1e-4), full * (1 + 1e-5)))
        times.append(time.perf_counter() - started)
        gaps.append(value / best - 1.0)
    ratio = common.spread(times)["median"] / ours["call_s"]["median"]
    return {"ours": ours, "cvxpy_s": common.spread(times), "ratio": ratio, "objective_over_cvxpy": common.spread(gaps)}
