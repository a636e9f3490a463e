"""Time of a schedule of split training by number of devices, and how far its sets are from the best ones.

A cohort is drawn as in the default cell: gains over four decades, payloads and starts that differ by ten. `latency` and
`latency, weighted` are the sets and shares of least latency for devices that count alike and by weight, `energy` those
of least energy. `gaps` is by how much the objective of a set of `GAP_DEVICES` devices lies above the least of all sets,
each on its own best shares, in parts of the gains of all.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import solver_peers
from solver_timing import timed

from fedjax_lora.control.solver import device_energy, device_sets

BAND_HZ, POWER_W, PRICE = 2e7, 0.01, 1.0
GAP_DEVICES = 9


def draw(devices: int, seed: int) -> tuple[np.ndarray, ...]:
    """start_s, shared_s, bits, snr_hz, own_j and weights `[K]`."""
    rng = np.random.default_rng(seed)
    columns = (
        10 ** rng.uniform(-1, 0, devices),
        10 ** rng.uniform(-3, -2, devices),
        10 ** rng.uniform(6, 7, devices),
        10 ** rng.uniform(7, 11, devices),
        10 ** rng.uniform(-4, -2, devices),
        rng.dirichlet(np.full(devices, 2.0)),
    )
    return tuple(np.asarray(column, np.float32) for column in columns)


def demand_of(columns: tuple[Any, ...]) -> device_sets.Demand:
    """Of devices that are all able."""
    start_s, shared_s, bits, snr_hz, _, _ = columns
    return device_sets.Demand(start_s[:, None], shared_s, bits[:, None], snr_hz, jnp.ones(bits.shape, bool))


def costs_of(columns: tuple[Any, ...]) -> device_energy.Costs:
    """Of the same devices."""
    _, _, bits, snr_hz, own_j, _ = columns
    return device_energy.Costs(own_j, bits, snr_hz, jnp.ones(bits.shape, bool))


def alike(*columns: Any) -> Any:
    """Half of the latency of all is what they all gain."""
    demand = demand_of(columns)
    return device_sets.best_equal(demand, BAND_HZ, PRICE, gain_of_all(*columns) / columns[0].size)


def weighted(*columns: Any) -> Any:
    """The same gain in parts of unequal size."""
    return device_sets.best_weighted(demand_of(columns), BAND_HZ, PRICE, gain_of_all(*columns) * columns[5])


def by_energy(*columns: Any) -> Any:
    """Half of the energy of all, in the same parts."""
    gains = energy_of_all(*columns) * columns[5]
    return device_energy.best_by_energy(costs_of(columns), BAND_HZ, POWER_W, PRICE, gains)


def gain_of_all(*columns: Any) -> Any:
    """Scalar, s."""
    everyone = jnp.ones(columns[0].shape, bool)
    return 0.5 * PRICE * device_sets.least_time_of(demand_of(columns), everyone, BAND_HZ)[0]


def energy_of_all(*columns: Any) -> Any:
    """Scalar, J."""
    everyone = jnp.ones(columns[0].shape, bool)
    return 0.5 * PRICE * device_energy.least_energy(costs_of(columns), everyone, BAND_HZ, POWER_W)[0]


SOLVERS = {"latency": alike, "latency, weighted": weighted, "energy": by_energy}


def measure(devices: int, cases: int, seconds: float) -> dict[str, Any]:
    """Each of SOLVERS by so many devices."""
    cohorts = [draw(devices, seed) for seed in range(cases)]
    return {name: timed(solve, cohorts, seconds) for name, solve in SOLVERS.items()}


def beside_cvxpy(devices: int, cases: int, seconds: float) -> dict[str, Any]:
    """The schedule by weights, and of energy, beside CVXPY on every set of the devices: times and objectives."""
    found = {}
    for name, of_all in (("latency, weighted", gain_of_all), ("energy", energy_of_all)):
        cohorts = [draw(devices, seed) for seed in range(cases)]
        ours, times, apart = timed(SOLVERS[name], cohorts, seconds), [], []
        for columns in cohorts:
            scale = float(of_all(*columns))
            started = time.perf_counter()
            if name == "energy":
                best = solver_peers.least_energy_set(columns, BAND_HZ, POWER_W, PRICE, scale * columns[5])
            else:
                best = solver_peers.least_latency_set(columns, BAND_HZ, PRICE, scale * columns[5])
            times.append(time.perf_counter() - started)
            apart.append((float(jax.jit(SOLVERS[name])(*columns).objective) - best) / scale)
        ratio = common.spread(times)["median"] / ours["call_s"]["median"]
        found[name] = {
            "ours": ours,
            "cvxpy_s": common.spread(times),
            "ratio": ratio,
            "objective_above_cvxpy_in_gains": common.spread(apart),
        }
    return found


def gaps(cases: int) -> dict[str, dict[str, float]]:
    """Of the heuristics, over so many cohorts: median and extremes, and the share in which the best set was found."""
    sets = np.array(list(itertools.product([False, True], repeat=GAP_DEVICES)))

    def latencies(*columns: Any) -> tuple[Any, Any]:
        found = jax.vmap(lambda mask: device_sets.least_time_of(demand_of(columns), mask, BAND_HZ)[0])(sets)
        return PRICE * found - sets @ (gain_of_all(*columns) * columns[5]), gain_of_all(*columns)

    def energies(*columns: Any) -> tuple[Any, Any]:
        found = jax.vmap(lambda mask: device_energy.least_energy(costs_of(columns), mask, BAND_HZ, POWER_W)[0])(sets)
        return PRICE * found - sets @ (energy_of_all(*columns) * columns[5]), energy_of_all(*columns)

    pairs: dict[str, tuple[Callable, Callable]] = {
        "latency, weighted": (jax.jit(weighted), jax.jit(latencies)),
        "energy": (jax.jit(by_energy), jax.jit(energies)),
    }
    table = {}
    for name, (solve, every) in pairs.items():
        found = []
        for seed in range(cases):
            columns = draw(GAP_DEVICES, seed)
            mask, (worth, scale) = np.asarray(solve(*columns).mask), every(*columns)
            own = np.asarray(worth)[(sets == mask).all(-1)][0]
            found.append(float((own - np.min(worth)) / scale))
        table[name] = common.spread(found) | {"best_set_found": float(np.mean(np.array(found) < 1e-5))}
    return table
