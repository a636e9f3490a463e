"""Time of what a server solves in every round, beside CVXPY on the same cohorts; prints JSON.

`allocation`: shares of the band of least latency (`min_max_latency`). `tsfa`: ranks and shares, the controller's round
and its continuous problem alone (`solver_tsfa.py`). `scheduling`: who takes part in split training, with the shares,
and how far the sets are from the best ones (`solver_sets.py`). All are jitted, in float32; compile time is apart, and
calls have a median and extremes. CVXPY is in float64; the time of its own compiling is part of a call, since it
compiles each problem anew.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import solver_peers
import solver_sets
import solver_tsfa
from solver_timing import timed

from fedjax_lora.wireless import min_max_latency

PARTS = ("allocation", "tsfa", "scheduling", "gaps")
GOAL_CLIENTS, GOAL_S = 256, 1e-3
"""A round of TSFA is to take no longer."""


def allocate(bits: Any, snr_hz: Any, start_s: Any, *_: Any) -> Any:
    """Of a cohort of `solver_tsfa`, who all send every rank."""
    return min_max_latency(bits, snr_hz, start_s, solver_tsfa.BAND_HZ)


def allocation(clients: int, cases: int, seconds: float) -> dict[str, Any]:
    """Of so many clients."""
    return timed(allocate, [solver_tsfa.cohort(clients, seed) for seed in range(cases)], seconds)


def allocation_beside_cvxpy(clients: int, cases: int, seconds: float) -> dict[str, Any]:
    """Both on the same cohorts: seconds of a call and the relative difference of the latency."""
    cohorts = [solver_tsfa.cohort(clients, seed) for seed in range(cases)]
    ours, times, apart = timed(allocate, cohorts, seconds), [], []
    for case in cohorts:
        started = time.perf_counter()
        best = solver_peers.least_latency(case[0], case[1], case[2], solver_tsfa.BAND_HZ)
        times.append(time.perf_counter() - started)
        apart.append(float(jax.jit(allocate)(*case).latency_s) / best - 1.0)
    ratio = common.spread(times)["median"] / ours["call_s"]["median"]
    return {"ours": ours, "cvxpy_s": common.spread(times), "ratio": ratio, "latency_over_cvxpy": common.spread(apart)}


def part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One of PARTS."""
    if name == "gaps":
        return {"devices": solver_sets.GAP_DEVICES, "cases": options.gap_cases} | solver_sets.gaps(options.gap_cases)
    sizes = options.devices if name == "scheduling" else options.clients
    compared = options.cvxpy_devices if name == "scheduling" else options.cvxpy_clients
    own: dict[str, Callable] = {
        "allocation": allocation,
        "tsfa": solver_tsfa.measure,
        "scheduling": solver_sets.measure,
    }
    beside: dict[str, Callable] = {
        "allocation": allocation_beside_cvxpy,
        "tsfa": solver_tsfa.beside_cvxpy,
        "scheduling": solver_sets.beside_cvxpy,
    }
    cases, seconds = options.cases, options.seconds
    return {
        "sizes": {str(size): own[name](size, cases, seconds) for size in sizes},
        "beside_cvxpy": {str(size): beside[name](size, min(cases, 4), seconds) for size in compared},
    }


def checks(found: dict[str, Any]) -> dict[str, Any]:
    """What is asked of TSFA, where it was measured."""
    row = found.get("tsfa", {}).get("sizes", {}).get(str(GOAL_CLIENTS))
    if row is None:
        return {}
    value = row["round"]["call_s"]["median"]
    return {
        f"tsfa, a round of {GOAL_CLIENTS} clients, s": {
            "asked": f"<= {GOAL_S}",
            "value": value,
            "holds": value <= GOAL_S,
        }
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(%(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64, 256, 1024, 4096], help="(%(default)s)")
    parser.add_argument("--devices", type=int, nargs="+", default=[32, 128, 1024], help="to schedule (%(default)s)")
    parser.add_argument("--cvxpy-clients", type=int, nargs="*", default=[4, 16, 64, 256], help="none to leave it out")
    parser.add_argument("--cvxpy-devices", type=int, nargs="*", default=[5], help="all sets of so many; none likewise")
    parser.add_argument("--cases", type=int, default=8, help="cohorts of each size (%(default)s)")
    parser.add_argument("--gap-cases", type=int, default=200, help="cohorts of the gaps (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls of each (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "solver_throughput", "environment": common.environment()}
    result |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    result |= {"ranks": solver_tsfa.RANKS, "band_hz": solver_tsfa.BAND_HZ}
    for name in options.parts:
        result[name] = part(name, options)
        common.note(f"{name}: done")
    common.emit(result | {"checks": checks(result)}, options.out)


if __name__ == "__main__":
    main()
