"""TSFA online against a knapsack of slivers, SLSQP, brute force over whole ranks, and its laws."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedjax_lora.control import TsfaConfig, tsfa_online
from fedjax_lora.control.tsfa_online import solve
from fedjax_lora.core.network import Observation, Outcome, Radio
from fedjax_lora.core.numbers import fill, split
from fedjax_lora.wireless import min_max_latency, uplink_rate
from oracles import tsfa_oracle, wireless_oracle
from oracles.tsfa_cases import BAND, CLIENTS, RANKS, able, random_case, steps, tails

solve_client = jax.jit(solve)
solve_common = jax.jit(functools.partial(solve, ratio="common"))


CVXPY = json.loads((Path(__file__).parents[1] / "vectors" / "tsfa.json").read_text())["objective_over_queue_s"]


def check_feasible(case, decision):
    """In float64 at the float32 answer: shares within the band, ends within the latency, ratios within bounds."""
    bits, snr, start = (np.float64(x) for x in case[:3])
    shares, ratios = np.float64(decision.bandwidth_hz), np.float64(decision.keep_ratio)
    who = able(case)
    assert np.isfinite(np.concatenate([x.ravel() for x in map(np.asarray, decision)])).all()
    assert shares.sum() <= BAND * (1 + 1e-6)
    np.testing.assert_array_equal(shares[~who], 0)
    assert (ratios > 0).all() and (ratios <= 1).all()
    ends = start[who] + ratios[who] * bits[who] / wireless_oracle.rate(shares[who], snr[who])
    assert (ends <= float(decision.latency_s) * (1 + 1e-5)).all()


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_the_knapsack_of_slivers_finds_no_lower_objective(first):
    """tsfa_oracle in float64 on 200 cohorts of up to six: at the answer's latency its objective is the answer's, and
    over all latencies none is lower by 1e-4; every answer is feasible. CVXPY's optima are the answer's too."""
    for seed in range(first, first + 50):
        case = random_case(seed)
        decision = solve_client(*case)
        check_feasible(case, decision)
        if able(case).any():
            least, step, gain, *radio = steps(case)
            latency = float(decision.latency_s) * (1 + 2e-6)
            same = latency + gain.sum() - tsfa_oracle.spend(latency, least, step, gain, *radio)
            found = float(decision.objective / case[6])
            np.testing.assert_allclose(found, same, rtol=1e-4, err_msg=str(seed))
            assert found <= tsfa_oracle.solve(least, step, gain, *radio)[0] * (1 + 1e-4), seed
            np.testing.assert_allclose(found, CVXPY[str(seed)], rtol=1e-4, err_msg=str(seed))


def test_slsqp_finds_no_lower_objective():
    """SLSQP over step shares, band and latency at once, from the answer and from the equal split."""
    compared = 0
    for seed in range(12):
        case = random_case(seed, left_out=False)
        least, step, gain, snr, start, band = steps(case)
        decision, (count, depth) = solve_client(*case), step.shape

        def parts(x, count=count, depth=depth):
            return x[: count * depth].reshape(count, depth), x[count * depth : -1] * BAND, x[-1]

        def slack(x, least=least, step=step, snr=snr, start=start, parts=parts):
            sent, share, latency = parts(x)
            return latency - start - (least + (sent * step).sum(1)) / wireless_oracle.rate(share, snr)

        def cost(x, gain=gain, parts=parts):
            return parts(x)[2] + np.sum((1 - parts(x)[0]) * gain)

        best = float(decision.objective / case[6])
        equal = np.max(start + (least + step.sum(1)) / wireless_oracle.rate(band / count, snr))
        ranks = np.clip(np.float64(decision.keep_ratio)[:, None] * RANKS - np.arange(1, RANKS), 0, 1)
        share = np.maximum(np.float64(decision.bandwidth_hz) / band, 1e-4)
        for origin in (
            np.concatenate([ranks.ravel(), share, [float(decision.latency_s) * 1.001]]),
            np.concatenate([np.ones(step.size), np.full(count, 1 / count), [equal]]),
        ):
            found = optimize.minimize(
                cost,
                origin,
                method="SLSQP",
                bounds=[(0, 1)] * step.size + [(1e-5, 1)] * count + [(0, None)],
                constraints=[
                    {"type": "ineq", "fun": slack},
                    {"type": "ineq", "fun": lambda x, parts=parts: 1 - parts(x)[1].sum() / BAND},
                ],
                options={"ftol": 1e-9, "maxiter": 200},
            )
            if slack(found.x).min() > -1e-5:
                compared += 1
                assert best <= found.fun * (1 + 1e-4)
    assert compared >= 8


@pytest.mark.parametrize(("clients", "most"), [(1, 3), (2, 3), (3, 3), (4, 3), (5, 3), (6, 3), (3, 2), (5, 2)])
def test_brute_force_over_whole_ranks_finds_no_lower_objective(clients, most):
    """All combinations of up to `most` whole ranks of 3: their best lies between the continuous optimum and the
    controller's choice, which rounds down; some are power-limited, and one of more than two has nothing to send."""
    rng, ranks, equal = np.random.default_rng(clients), 3, 0
    kept = np.array(list(itertools.product(range(1, most + 1), repeat=clients)))
    limit = functools.partial(solve_client, max_keep_ratio=most / ranks)
    config = TsfaConfig(tail="energy", max_keep_ratio=most / ranks)
    whole = jax.jit(
        jax.vmap(lambda bits, snr, start: min_max_latency(bits, snr, start, BAND).latency_s, (0, None, None))
    )
    decide = jax.jit(lambda *case: allocate(fill(config, {"V": case[7]}), case, beside=0.0))
    for _ in range(12):
        bits, snr, start = (np.float32(10 ** rng.uniform(*x, clients)) for x in ((6, 7), (5.5, 10), (-2, -0.5)))
        bits[2:3] = 0.0
        tail, weights = (
            np.float32(tails(rng.exponential(1, (clients, ranks)))),
            np.float32(rng.dirichlet(np.ones(clients))),
        )
        unit = float(min_max_latency(bits, snr, start, BAND).latency_s)
        case = (
            bits,
            snr,
            start,
            np.float32(BAND),
            weights,
            tail,
            np.float32(1),
            np.float32(unit * 10 ** rng.uniform(-2, 1)),
        )
        latency = whole(np.float32(kept / ranks * bits), snr, start)
        lost = np.where(bits > 0, weights * tail[np.arange(clients), kept], 0.0)
        best = float((case[7] * lost.sum(1) + latency).min())
        decision, rounded = limit(*case), decide(*case)
        assert decision.objective <= best * (1 + 1e-4) and best <= rounded.objective * (1 + 1e-4)
        # Rounding gives up no more than what the ranks that it takes away hold.
        floor = np.floor(np.float64(decision.keep_ratio) * ranks + 1e-4).astype(int)
        at_floor = np.sum(np.where(bits > 0, weights * tail[np.arange(clients), np.maximum(floor, 1)], 0.0))
        assert rounded.objective <= (case[7] * at_floor + decision.latency_s) * (1 + 1e-4)
        equal += np.isclose(decision.objective, best, rtol=1e-4)
    assert equal >= 2  # often the continuous optimum is whole


@pytest.mark.parametrize("function", [solve_client, solve_common], ids=["client", "common"])
def test_limits_of_V_and_of_the_queue(function):
    """Without a queue or with a large V the most is sent, in least time; with V = 0 the least is."""
    bits, snr, start, band, weights, tail, *_ = random_case(1, left_out=False)
    everything = min_max_latency(bits, snr, start, band)
    for queue, V in ((0.0, 1.0), (0.0, 0.0), (1.0, 1e12)):
        decision = function(bits, snr, start, band, weights, tail, queue, V)
        np.testing.assert_allclose(decision.keep_ratio, 1, rtol=1e-6)
        np.testing.assert_allclose(decision.latency_s, everything.latency_s, rtol=1e-6)
        np.testing.assert_allclose(decision.objective, queue * everything.latency_s, rtol=1e-6)
        limited = function(bits, snr, start, band, weights, tail, queue, V, max_keep_ratio=0.45)
        np.testing.assert_allclose(limited.keep_ratio, 0.45, rtol=1e-6)
    decision = function(bits, snr, start, band, weights, tail, 1.0, 0.0, min_keep_ratio=0.3)
    np.testing.assert_allclose(decision.keep_ratio, 0.3, rtol=1e-6)
    np.testing.assert_allclose(
        decision.latency_s, min_max_latency(np.float32(0.3) * bits, snr, start, band).latency_s, rtol=1e-6
    )


@jax.jit
def gradient(*case):
    def loss(*case):
        decision = solve(*case)
        return decision.latency_s + decision.keep_ratio.sum() + 1e-30 * decision.objective

    return jax.grad(loss, tuple(range(8)))(*case)


@pytest.mark.parametrize("weird", ["empty", "nobody", "no band", "all power-limited", "huge", "tiny", "flat"])
def test_extremes_are_finite_and_so_are_gradients(weird):
    """By definition: nobody takes no time; whatever the scale, ratios stay in (0, 1] and nothing is NaN."""
    bits, snr, start, band, weights, tail, queue, V = random_case(2)
    if weird == "empty":
        bits, snr, start, weights, tail = bits[:0], snr[:0], start[:0], weights[:0], tail[:0]
    weights = weights * 0 if weird == "nobody" else weights
    band = np.float32(0) if weird == "no band" else band
    snr = np.full_like(snr, 1e3) if weird == "all power-limited" else snr
    V, tail = (np.float32(1e30), tail * 1e6) if weird == "huge" else (V, tail)
    V, queue = (np.float32(1e-12), np.float32(1e-12)) if weird == "tiny" else (V, queue)
    tail = tail * 0 if weird == "flat" else tail
    case = bits, snr, start, band, weights, tail, queue, V

    decision = solve_client(*case)
    assert all(np.isfinite(x).all() for x in (*decision, *gradient(*case)))
    assert ((decision.keep_ratio > 0) & (decision.keep_ratio <= 1)).all()
    if weird in ("empty", "nobody", "no band"):
        assert decision.latency_s == 0 and decision.bandwidth_hz.sum() == 0


def test_who_is_left_out_changes_nothing():
    """Invariance: the others decide as in a cohort without them, and they get nothing."""
    bits, snr, start, band, weights, tail, queue, V = random_case(5, left_out=False)
    alone = solve_client(bits, snr, start, band, weights, tail, queue, V)
    padded = [np.append(x, [extra] * 3, 0).astype(np.float32) for x, extra in ((bits, 1e6), (snr, 1e9), (start, 0.5))]
    padded[0][-1], padded[1][-2] = 0, 0
    wide = np.append(weights, np.float32([0, 0.2, 0.2]))
    found = solve_client(*padded, band, wide, np.append(tail, tail[:3], 0), queue, V)
    np.testing.assert_allclose(found.keep_ratio[:CLIENTS], alone.keep_ratio, atol=1e-3)
    np.testing.assert_allclose(found.objective, alone.objective, rtol=1e-5)
    np.testing.assert_array_equal(found.bandwidth_hz[CLIENTS:], 0)
    np.testing.assert_array_equal(found.keep_ratio[CLIENTS:], 1)


def test_vmap_equals_a_loop():
    cases = [random_case(seed) for seed in range(10, 14)]
    stacked = [jnp.stack(column) for column in zip(*cases, strict=True)]
    mapped = jax.jit(jax.vmap(solve))(*stacked)
    for row, case in enumerate(cases):
        for many, one in zip(mapped, solve_client(*case), strict=True):
            np.testing.assert_allclose(many[row], one, rtol=2e-4)


def test_common_start_and_ratio_make_the_latency_affine():
    """tau(rho) = t0 + rho tau_1, so that with a common ratio the optimum of `1 - rho` is at an end."""
    bits, snr, _, band, weights, *_ = random_case(6, left_out=False)
    start, linear = np.full(CLIENTS, np.float32(0.4)), np.tile(np.float32([1, 0]), (CLIENTS, 1))
    full = float(min_max_latency(bits, snr, start, band).latency_s) - 0.4
    for ratio in (0.1, 0.35, 0.8):
        decision = solve_common(bits, snr, start, band, weights, linear, 1.0, 0.0, min_keep_ratio=ratio)
        np.testing.assert_allclose(decision.latency_s, 0.4 + ratio * full, rtol=1e-5)
    for V, expected in ((0.9 * full, 0.1), (1.1 * full, 1.0)):
        decision = solve_common(bits, snr, start, band, weights, linear, 1.0, V, min_keep_ratio=0.1)
        np.testing.assert_allclose(decision.keep_ratio, expected, rtol=1e-5)


@pytest.mark.parametrize("most", [1.0, 0.45, 0.25])
@pytest.mark.parametrize("seed", range(6))
def test_common_ratio_equals_a_search_over_a_grid(seed, most):
    """Brute force: 4001 common ratios, by `min_max_latency` alone; all start together, where the problem is convex.

    V rises from where the least is best to where the most is; on the way the best lies in the last step as well.
    """
    bits, snr, _, band, weights, tail, queue, V = random_case(seed, left_out=False)
    start = np.full(CLIENTS, np.float32(0.2))
    ratios = np.linspace(1 / RANKS, most, 4001, dtype=np.float32)
    whole = jax.jit(jax.vmap(lambda ratio: min_max_latency(ratio * bits, snr, start, band).latency_s))
    lost = sum(w * np.interp(ratios * RANKS, np.arange(RANKS + 1), t) for w, t in zip(weights, tail, strict=True))
    latency_s, lasts = np.float64(whole(ratios)), []
    turn = queue * np.max(np.diff(latency_s) / -np.diff(lost))  # a V with which the most is best
    for V in np.float32(turn * np.geomspace(0.02, 2.0, 40)):
        values = V * lost + queue * latency_s
        decision = solve_common(bits, snr, start, band, weights, tail, queue, V, max_keep_ratio=most)
        np.testing.assert_allclose(decision.keep_ratio, decision.keep_ratio[0], rtol=1e-6)
        assert values.min() * (1 - 1e-4) <= decision.objective <= values.min() * (1 + 1e-6)
        lasts.append((ratios[values.argmin()] - most) * RANKS)
    assert min(lasts) < -1 + 1e-3 and max(lasts) == 0


def observation(case, rank=None, beside=0.1):
    """A cohort as the controller sees it; `beside` the ranks, that share of the payload is always sent."""
    bits, snr, start, band, weights, tail, _, _ = (jnp.asarray(x) for x in case)
    clients, num_ranks = tail.shape[0], tail.shape[1] - 1
    rank = jnp.full(clients, float(num_ranks)) if rank is None else jnp.asarray(rank, jnp.float32)
    ranks = jnp.arange(num_ranks + 1)
    return Observation(
        radio=Radio(snr, start, band, power_w=jnp.float32(0.01)),
        weights=weights,
        rank=rank,
        tail_energy=jnp.where(ranks < rank[:, None], tail, 0.0),
        bits=bits[:, None] * (beside + jnp.clip(ranks, 1, rank[:, None]) / num_ranks),
    )


def allocate(options, case, rank=None, beside=0.1):
    """The controller's decision where its queue is the case's."""
    queues = {"queue_s": jnp.asarray(case[6])}
    return tsfa_online.make(options).allocate(queues, observation(case, rank, beside))


@pytest.mark.parametrize(("ratio", "tail"), [("client", "energy"), ("common", "linear")])
def test_rounding_never_exceeds_the_planned_latency(ratio, tail):
    """The plan is `solve` at the same payloads; kept are whole ranks within the limits; ends are met."""
    config = TsfaConfig(V=3.0, min_keep_ratio=0.2, max_keep_ratio=0.7, ratio=ratio, tail=tail)
    rank = np.array([8, 4, 8, 6, 8, 3])

    @jax.jit
    def both(case):
        seen = observation(case, rank)
        bits, snr, start, band, weights, _, queue, _ = case
        cost = seen.tail_energy if tail == "energy" else jnp.maximum(1 - jnp.arange(RANKS + 1) / rank[:, None], 0)
        payloads = bits[:, None] * (0.1 + jnp.clip(jnp.arange(RANKS + 1), 1, rank[:, None]) / RANKS)
        limits = {"min_keep_ratio": np.ceil(0.2 * rank) / rank, "max_keep_ratio": np.floor(0.7 * rank) / rank}
        plan = solve(payloads, snr, start, band, weights, cost, queue, 3.0, **limits, rank=rank, ratio=ratio)
        decision = allocate(config, case, rank)
        sent = jnp.take_along_axis(seen.bits, decision.kept.astype(int)[:, None], 1)[:, 0]
        return plan, decision, start + sent / jnp.maximum(uplink_rate(decision.share_hz, snr), 1e-9)

    for seed in range(20):
        case = random_case(seed)
        plan, decision, ends = both(case)
        kept = np.asarray(decision.kept)
        np.testing.assert_array_equal(kept, np.round(kept))
        assert (kept >= np.ceil(0.2 * rank)).all() and (kept <= np.floor(0.7 * rank)).all()
        assert (kept <= plan.keep_ratio * rank + 1e-4).all()
        assert decision.latency_s <= plan.latency_s * (1 + 1e-5)
        assert (ends[able(case)] <= decision.latency_s * (1 + 1e-5)).all()
        assert np.sum(np.float64(decision.share_hz)) <= BAND * (1 + 1e-6)


def test_queue_bounds_the_mean_latency_and_steers_it_to_the_budget():
    """avg(tau) - budget <= (Q_T - Q_0) / T on random paths, by the controller's own queue, which adds up as float64's.

    Rounds take more and less than the budget.
    """
    config = TsfaConfig(V=1.0, latency_budget_s=0.35)
    controller = tsfa_online.make(config)
    bits, _, start, band, weights, tail, *_ = random_case(6, left_out=False)

    def round_(queues, snr):
        case = bits, snr, start * 0.01, band / 4, weights, tail, 0.0, 0.0
        latency = controller.allocate(queues, observation(case)).latency_s
        queues, report = controller.update(queues, Outcome(latency, jnp.float32(0)))
        return queues, (report["queue_s"], latency)

    rng = np.random.default_rng(0)
    gains = np.float32(1e8 * rng.exponential(1, (400, CLIENTS)) + 1e7)
    for first in (0.0, 5.0):
        _, (queues, latency) = jax.jit(lambda queue: jax.lax.scan(round_, {"queue_s": queue}, gains))(
            jnp.float32(first)
        )
        latency = np.float64(latency)
        for length in (1, 7, 400):
            queue = np.float64(first)
            for value in latency[:length]:
                queue = max(queue + value - 0.35, 0)
            assert latency[:length].mean() - 0.35 <= (queues[length - 1] - first) / length + 1e-6
            np.testing.assert_allclose(queues[length - 1], queue, rtol=1e-4, atol=1e-4)
        assert latency.max() > 0.35 > latency.min()


@pytest.mark.parametrize("energy_budget_j", [None, 0.1])
def test_all_numbers_are_traced(energy_budget_j):
    """Oracle: the options' own decision and queues; one compilation for two sets of numbers, None being structure."""
    case, count = random_case(6, left_out=False), []

    @functools.partial(jax.jit, static_argnums=0)
    def traced(structure, numbers):
        count.append(1)
        options = fill(structure, numbers)
        return allocate_from_first(options), tsfa_online.make(options).init()

    def allocate_from_first(options):
        controller = tsfa_online.make(options)
        queues = controller.init()
        decision = controller.allocate(queues, observation(case))
        return decision, controller.update(queues, Outcome(decision.latency_s, jnp.float32(0.3)))

    first = {"latency_budget_s": 0.3, "min_keep_ratio": 0.2, "max_keep_ratio": 0.6, "V": 1.0, "queue_s": 2.0}
    for numbers in (first, {**first, "V": 3.0, "queue_s": 0.5, "max_keep_ratio": 0.9}):
        config = TsfaConfig(**numbers, energy_budget_j=energy_budget_j)
        found, queues = traced(*split(config))
        alone = jax.jit(functools.partial(allocate_from_first, config))()
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, alone)
        assert queues["queue_s"] == numbers["queue_s"] and len(queues) == (1 if energy_budget_j is None else 2)
    assert len(count) == 1


def test_what_it_needs_and_breaks_follows_from_its_options():
    """By definition: tails count all that may be sent unless they are linear; energy is a second budget."""
    assert TsfaConfig().needs() == {"whole_tail": "tail"} and TsfaConfig(tail="linear").needs() == {}
    assert TsfaConfig(energy_budget_j=1.0).breaks() == {"latency_alone": "energy_budget_j"}
    assert TsfaConfig().breaks() == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("V", -1.0),
        ("latency_budget_s", 0.0),
        ("queue_s", -0.5),
        ("queue_s", 1e6),
        ("energy_budget_j", 0.0),
        ("min_keep_ratio", 0.0),
        ("tail", "cubic"),
        ("ratio", "own"),
        ("name", "x"),
    ],
)
def test_config_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got {value!r}$"):
        TsfaConfig(**{field: value})


@pytest.mark.parametrize(
    ("bits", "tail"), [((3,), (2, 4)), ((3, 2), (3, 4)), ((3,), (3, 1)), ((2,), (3, 4)), ((), (3, 4))]
)
def test_shapes_are_checked(bits, tail):
    one = jnp.ones(3)
    with pytest.raises(ValueError, match=r"tail_energy \[K, R \+ 1\], .*, got"):
        solve(jnp.ones(bits), one, one, 1.0, one, jnp.ones(tail), 1.0, 1.0)


def test_a_ratio_that_is_none_is_refused():
    one = jnp.ones(3)
    with pytest.raises(ValueError, match=r"^ratio must be one of client, common, got 'own'$"):
        solve(one, one, one, 1.0, one, jnp.ones((3, 4)), 1.0, 1.0, ratio="own")
