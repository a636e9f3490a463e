"""TSFA's implicit gradients against finite differences in float64 of conditions and searches that know no JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedjax_lora.control.tsfa_online import solve
from fedjax_lora.wireless import min_max_latency
from oracles import wireless_oracle
from oracles.tsfa_cases import BAND, tails


def smooth_case(seed, ranks=1):
    """A cohort of four, of similar payloads, whose tail is `1 - rho` or has steps: several keep a share of a step."""
    rng = np.random.default_rng(seed)
    bits, snr = 10 ** rng.uniform(6, 6.5, 4), 10 ** rng.uniform(7, 9, 4)
    weights, start = rng.dirichlet(np.full(4, 5.0)), rng.uniform(0, 0.1, 4)
    V = 10 ** rng.uniform(-0.3, 0.7)
    tail = np.tile([1.0, 0.0], (4, 1)) if ranks == 1 else tails(rng.dirichlet(np.full(ranks, 5.0), 4))
    return tuple(np.float32(x) for x in (bits, snr, start, BAND / 10, weights, tail, 1.0, V))


def optimum(free, ratio, step, *case):
    """Ratios, latency and objective in float64, from the optimality conditions with the free clients given.

    step: `[K]` of each client, on which its tail is a line.
    """
    bits, snr, start, band, weights, tail, queue, V = (np.float64(x) for x in case)
    ratio, clients, ranks = np.float64(ratio), np.arange(len(bits)), tail.shape[1] - 1
    slope = (tail[clients, step] - tail[clients, step + 1]) * ranks
    left_out = tail[clients, step] + slope * step / ranks  # at rho = 0, were the line as long

    def state(x):
        rho = ratio.copy()
        rho[free], latency = x[:-2], x[-2]
        upload = latency - start
        share = wireless_oracle.required_bandwidth(rho * bits / upload, snr)
        s = snr / share
        return rho, latency, upload, share, (np.log1p(s) - s / (1 + s)) / np.log(2)

    def misses(x):
        rho, _, upload, share, by_band = state(x)
        price = np.exp(x[-1])
        pull = rho * bits / by_band / upload**2
        inside = np.log(V * weights * slope / bits * upload * by_band / price)[free]
        return np.concatenate([inside, [share.sum() / band - 1, np.log(price * pull.sum() / queue)]])

    latency = wireless_oracle.min_max_latency(ratio * bits, snr, start, band)[0]
    upload = latency - start
    s = snr / wireless_oracle.required_bandwidth(ratio * bits / upload, snr)
    by_band = (np.log1p(s) - s / (1 + s)) / np.log(2)
    price = queue / np.sum(ratio * bits / by_band / upload**2)
    found = optimize.root(misses, np.concatenate([ratio[free], [latency, np.log(price)]]), tol=1e-13)
    assert np.abs(found.fun).max() < 1e-9
    rho, latency, *_ = state(found.x)
    return np.concatenate([rho, [latency, V * np.sum(weights * (left_out - slope * rho)) + queue * latency]])


_EVERY = [pytest.param(*case, 40, marks=pytest.mark.slow) for case in ((1, 1.0), (3, 1.0), (3, 0.8))]


@pytest.mark.parametrize(("ranks", "most", "cohorts"), [(3, 0.8, 4), *_EVERY])
def test_implicit_gradients_match_float64_finite_differences(ranks, most, cohorts):
    """Central differences of the conditions solved by MINPACK in float64: ratios, latency and objective by all
    arguments, as derivatives by their logarithms (by start and tail themselves), to 3e-3 of an output's own size or of
    its largest derivative by that argument: where the objective is so flat that float32 knows the best ratio to 1.5e-3
    alone, its derivative there is as far off. Forty cohorts (or four), of those in which no client is about to enter
    or leave its step."""
    names = {0: "bits", 1: "snr", 2: "start", 3: "band", 4: "weights", 5: "tail", 6: "queue", 7: "V"}

    def outputs(*case):
        decision = solve(*case, min_keep_ratio=0.1, max_keep_ratio=most)
        return jnp.append(decision.keep_ratio, jnp.stack([decision.latency_s, decision.objective]))

    jacobian, function = jax.jit(jax.jacrev(outputs, tuple(names))), jax.jit(outputs)
    tried = 0
    for seed in range(400):
        case = smooth_case(seed, ranks)
        ratio = np.float64(function(*case))[:4]
        whole = np.where(ratio > most - 1e-5, most, np.round(ratio * ranks) / ranks)
        free = (ratio > 0.13) & (np.abs(ratio - whole) > 0.03)
        held = (ratio < 0.1001) | (np.abs(ratio - whole) < 1e-5)
        if not (free | held).all() or not free.any():
            continue
        tried += 1
        if tried > cohorts:
            break
        ratio[held] = np.where(ratio[held] < 0.1001, np.float32(0.1), whole[held])
        step = np.minimum(np.floor(ratio * ranks + 1e-6).astype(int), ranks - 1)
        for argument, found in zip(names, jacobian(*case), strict=True):
            given = np.float64(case[argument])
            unit = np.ones_like(given) if argument in (2, 5) else given
            columns = []
            for place in np.ndindex(given.shape):
                ends = []
                for sign in (1, -1):
                    moved = [np.array(x, np.float64) for x in case]
                    moved[argument][place] += sign * 1e-5 * unit[place]
                    ends.append(optimum(free, ratio, step, *moved))
                columns.append((ends[0] - ends[1]) / 2e-5)
            expected = np.stack(columns, -1)
            got = np.reshape(found, expected.shape) * unit.ravel()
            # Changes of the latency through payloads and through shares nearly cancel: its own size is the scale.
            scale = np.maximum(np.abs(expected).max(1), np.abs(function(*case)))[:, None]
            np.testing.assert_array_less(np.abs(got - expected) / scale, 3e-3, err_msg=f"{names[argument]} {seed}")
    assert tried > cohorts


def test_gradient_of_a_common_ratio_matches_float64_finite_differences():
    """Latency and ratio by V and the queue; starts differ, so that the optimum lies inside of a step."""
    bits, snr, _, band, weights, linear, queue, _ = smooth_case(2)
    start = np.float32([0.0, 0.5, 0.1, 0.3])
    latency = jax.jit(jax.vmap(lambda ratio: min_max_latency(ratio * bits, snr, start, band).latency_s))

    def objective(ratio, V):
        exact = wireless_oracle.min_max_latency(ratio * bits, snr, start, band)[0]
        return V * (1 - ratio) + exact

    # The latency's slope rises from one end to the other: take a V in between.
    ends = latency(jnp.float32([0.2, 0.21, 0.9, 0.91]))
    V = 0.5 * float(ends[1] - ends[0] + ends[3] - ends[2]) / 0.01

    def best(V):
        return optimize.minimize_scalar(
            lambda ratio: objective(ratio, V), bounds=(0.1, 1), method="bounded", options={"xatol": 1e-12}
        ).x

    weights = np.full(4, np.float32(0.25))
    function = jax.jit(
        jax.value_and_grad(
            lambda V: solve(
                bits, snr, start, band, weights, linear, queue, V, min_keep_ratio=0.1, ratio="common"
            ).keep_ratio[0]
        )
    )
    value, gradient = function(V)
    assert 0.15 < value < 0.95
    np.testing.assert_allclose(value, best(V), rtol=2e-3)
    # At an optimum inside of a step dL/dr = V, hence dr/dV = 1 / L''.
    h = 1e-3
    below, at, above = (
        wireless_oracle.min_max_latency(ratio * np.float64(bits), snr, start, band)[0]
        for ratio in (float(value) - h, float(value), float(value) + h)
    )
    np.testing.assert_allclose(gradient, h**2 / (below - 2 * at + above), rtol=1e-3)


RANKED = {  # payloads in ranks, tail energies, ranks at ratio 1, starts, the V to try, and limits of the ratio
    "inside": (np.arange(2.0), np.float64([1, 0]), [0.7, 0.9, 0.95, 0.8], [0.0, 0.5, 0.1, 0.3], (0.05, 5.0), [1] * 4),
    "on a limit": (
        np.arange(2.0),
        np.float64([1, 0]),
        [0.7, 0.9, 0.95, 0.8],
        [0.0, 0.5, 0.1, 0.3],
        (0.222, 0.227),
        [1, 0.6, 1, 1],
    ),
    "on an end": (
        np.arange(5.0) + 0.4,
        np.float64([10, 5.5, 2.5, 0.8, 0]),
        [2.6, 3.3, 3.7, 2.9],
        [0.2] * 4,
        (0.03, 0.1),
        [1] * 4,
    ),
}


@pytest.mark.parametrize("kind", RANKED)
def test_gradient_of_a_common_ratio_by_ranks_matches_float64_finite_differences(kind):
    """Oracle: a bounded search in float64 with each client's rank moved; optima inside of all steps, on the end
    of a step, and where one client reaches its limit."""
    bits, snr, _, band, weights, *_ = (np.float64(x) for x in smooth_case(2))
    payload, tail, rank, start, ends, limits = RANKED[kind]
    rank, start, table = np.array(rank), np.array(start), np.outer(bits, payload / payload[-1])
    tails, whole = np.outer([1.0, 2.0, 0.5, 1.5], tail), np.arange(len(tail))

    def best(rank, V, near):
        def cost(ratio):
            kept = np.minimum(ratio, limits) * rank
            sent, lost = (
                np.array([np.interp(*x) for x in zip(kept, [whole] * 4, t, strict=True)]) for t in (table, tails)
            )
            latency = wireless_oracle.min_max_latency(sent, snr, start, band)[0]
            return V * weights @ lost + latency, latency

        found = optimize.minimize_scalar(
            lambda ratio: cost(ratio)[0], bounds=(near - 0.01, near + 0.01), method="bounded", options={"xatol": 1e-12}
        )
        assert all(cost(ratio)[0] >= found.fun for ratio in np.linspace(0.1, 1, 31))
        return np.array([found.x, cost(found.x)[1]])

    @jax.jit
    @functools.partial(jax.jacfwd, has_aux=True)
    def jacobian(rank, V):
        found = solve(
            *(table, snr, start, band, weights, tails, 1.0, V),
            rank=rank,
            min_keep_ratio=0.1 * np.ones(4),
            max_keep_ratio=jnp.array(limits),
            ratio="common",
        )
        both = jnp.stack([found.keep_ratio[0], found.latency_s])
        return both, both

    tried = 0
    for V in np.geomspace(*ends, 24):
        slopes, found = jacobian(jnp.float32(rank), np.float32(V))
        if not 0.13 < found[0] < 0.97:
            continue
        at = np.float64(found[0])
        assert kind != "on a limit" or abs(at - 0.6) < 1e-4
        assert (np.abs(at * rank - np.round(at * rank)).min() < 1e-4) == (kind == "on an end")
        np.testing.assert_allclose(found, best(rank, V, at), rtol=1e-3)
        moved = ((best(rank + step, V, at) - best(rank - step, V, at)) / 2e-3 for step in 1e-3 * np.eye(4))
        expected = np.stack(list(moved), 1)
        np.testing.assert_allclose(slopes, expected, atol=1e-3 * np.abs(expected).max(), err_msg=str(V))
        tried += 1
    assert tried >= 3
