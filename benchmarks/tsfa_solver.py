"""Time of TSFA's round, `control.tsfa_online`, beside CVXPY on the same cohorts; prints JSON.

A cohort is drawn as in the default cell: gains over four decades, payloads of 16 ranks, starts within 0.3 s, sorted
exponential tail energies. `round` is what the simulator runs: solve, round to whole ranks, share the band anew.
Compile time is apart; calls have a median and extremes. CVXPY (Clarabel) solves the problem at a given latency inside
of SciPy's bounded search around it; written with parameters (DPP) it was slower and failed at 16 clients.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

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


def timed(function: Callable[..., Any], cohorts: list[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """Compile time and seconds of a call, in turn over the cohorts."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*cohorts[0]).compile()
    compile_s = time.perf_counter() - started
    times, end = [], time.perf_counter() + seconds
    for case in cohorts:
        jax.block_until_ready(compiled(*case))
    while time.perf_counter() < end or len(times) < 2 * len(cohorts):
        case = cohorts[len(times) % len(cohorts)]
        started = time.perf_counter()
        jax.block_until_ready(compiled(*case))
        times.append(time.perf_counter() - started)
    return {"compile_s": compile_s, "call_s": common.spread(times), "calls": len(times)}


def measure(clients: int, cases: int, seconds: float) -> dict[str, Any]:
    """The controller's round and `solve` alone."""
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
        best = peer(case, V, (least * (1 + 1e-4), full * (1 + 1e-5)))
        times.append(time.perf_counter() - started)
        gaps.append(value / best - 1.0)
    ratio = common.spread(times)["median"] / ours["call_s"]["median"]
    return {"ours": ours, "cvxpy_s": common.spread(times), "ratio": ratio, "objective_over_cvxpy": common.spread(gaps)}


def peer(columns: tuple[np.ndarray, ...], V: float, bounds: tuple[float, float]) -> float:
    """The least objective at queue 1 by CVXPY, with a search of the latency within bounds."""
    import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)
    from scipy import optimize

    bits, snr_hz, start_s, weights, tail = (np.asarray(x, np.float64) for x in columns)
    gain = V * weights[:, None] * -np.diff(tail)[:, 1:]
    clients, total = len(bits), gain.sum()

    def at(latency_s: float) -> float:
        sent = cp.Variable((clients, RANKS - 1))
        share = cp.Variable(clients, nonneg=True)  # in units of the equal split
        rank_nats = clients * bits * np.log(2) / BAND_HZ / (latency_s - start_s) / RANKS
        needed = rank_nats + cp.multiply(rank_nats, cp.sum(sent, axis=1))
        snr = clients * snr_hz / BAND_HZ
        limits: list[Any] = [cp.rel_entr(share, share + snr) <= -needed, cp.sum(share) <= clients, sent >= 0, sent <= 1]
        problem: Any = cp.Problem(cp.Maximize(cp.sum(cp.multiply(gain / total, sent))), limits)
        problem.solve(solver=cp.CLARABEL)
        return latency_s + total * (1 - problem.value)

    found: Any = optimize.minimize_scalar(at, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(found.fun)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--cvxpy-clients", type=int, nargs="*", default=[4, 16, 64], help="none to leave it out")
    parser.add_argument("--cases", type=int, default=8, help="cohorts of each size (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, each (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    record = common.environment()
    found = {str(clients): measure(clients, options.cases, options.seconds) for clients in options.clients}
    compared = {
        str(clients): beside_cvxpy(clients, min(options.cases, 4), options.seconds) for clients in options.cvxpy_clients
    }
    common.emit({"environment": record, "ranks": RANKS, "clients": found, "beside_cvxpy": compared}, options.out)


if __name__ == "__main__":
    main()
