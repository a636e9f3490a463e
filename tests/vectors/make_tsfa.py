"""Writes `tsfa.json`: optima of TSFA's round by CVXPY, one for each seed of `oracles.tsfa_cases.random_case`.

Run from the tests folder, with the extra `bench` installed: `python vectors/make_tsfa.py 0 200`. At a latency the
problem is convex; Clarabel solves it there, in a search of the latency around that of `tsfa_oracle`.
"""

import json
import sys
from pathlib import Path

import cvxpy as cp  # pyright: ignore[reportMissingImports] (extra `bench`)
import numpy as np
from scipy import optimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import tsfa_oracle
from oracles.tsfa_cases import able, random_case, steps
from oracles.wireless_oracle import min_max_latency


def at_latency(latency_s, least, step, gain, snr_hz, start_s, band_hz):
    """Least `latency + what is not gained`, s, of those who can send; inf where the least does not fit."""
    clients, unit_hz = len(least), band_hz / len(least)
    sent, share = cp.Variable(step.shape), cp.Variable(clients, nonneg=True)  # shares in units of the equal split
    nats = np.log(2) / unit_hz / (latency_s - start_s)
    needed = nats * least + cp.sum(cp.multiply(nats[:, None] * step, sent), axis=1)
    carried = -cp.rel_entr(share, share + snr_hz / unit_hz)
    limits = [carried >= needed, cp.sum(share) <= clients, sent >= 0, sent <= 1]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(gain / gain.sum(), sent))), limits)
    try:
        problem.solve(solver=cp.CLARABEL)
    except cp.SolverError:
        return np.inf
    if problem.status not in ("optimal", "optimal_inaccurate"):
        return np.inf
    return latency_s + gain.sum() * (1 - problem.value)


def optimum(case):
    """Least objective over the queue, s; None where nobody can send."""
    if not able(case).any():
        return None
    args = steps(case)
    _, near = tsfa_oracle.solve(*args, points=100)
    low, high = (min_max_latency(bits, *args[3:])[0] for bits in (args[0], args[0] + args[1].sum(1)))
    bounds = max(0.97 * near, low * (1 + 1e-6)), min(1.03 * near, high)
    found = optimize.minimize_scalar(
        lambda latency_s: at_latency(latency_s, *args), bounds=bounds, method="bounded", options={"maxiter": 10}
    )
    return float(min(found.fun, at_latency(near, *args), high))  # at `high` everything is gained


def main(first, last):
    """Adds the seeds from first to before last to what the file holds."""
    path = Path(__file__).with_name("tsfa.json")
    found = json.loads(path.read_text())["objective_over_queue_s"] if path.exists() else {}
    found |= {str(seed): optimum(random_case(seed)) for seed in range(first, last)}
    path.write_text(json.dumps({"cvxpy": cp.__version__, "objective_over_queue_s": found}, indent=0) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
