"""TSFA online over many rounds: laws of its queues, its limits, the static problem's multiplier, and its baselines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedjax_lora.control import (
    GreedyConfig,
    ProportionalConfig,
    TsfaConfig,
    UniformConfig,
    common,
    greedy,
    proportional,
    tsfa_online,
    uniform,
)
from fedjax_lora.control.tsfa_online import solve
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Observation, Outcome, Radio
from fedjax_lora.planning import rank_search
from fedjax_lora.wireless import min_max_latency, uplink_rate
from oracles import tsfa_oracle

CLIENTS, RANKS, BAND_HZ, POWER_W = 4, 4, 2e6, 0.5
BITS = np.float32([2e6, 3e6, 2e6, 4e6])
START_S = np.float32([0.05, 0.1, 0.08, 0.02])
WEIGHTS = np.float32([0.3, 0.2, 0.1, 0.4])
TAIL = np.float32([[10, 6, 3, 1, 0], [8, 3, 1.5, 0.5, 0], [20, 12, 6, 2, 0], [4, 2.5, 1.2, 0.4, 0]])
COMPUTE_J = 0.02
CONTEXT = Context(num_clients=CLIENTS, cohort_size=CLIENTS)


def gains(rounds, seed=0):
    """Received power over noise density of clients 20 dB apart, under fading that is never too deep to send at all."""
    rng = np.random.default_rng(seed)
    return np.float32([1e8, 3e7, 1e7, 1e9] * (0.1 + rng.exponential(1, (rounds, CLIENTS))))


def observation(snr_hz, tail=TAIL):
    radio = Radio(jnp.asarray(snr_hz), jnp.asarray(START_S), band_hz=jnp.float32(BAND_HZ), power_w=jnp.float32(POWER_W))
    return Observation(
        radio=radio,
        weights=jnp.asarray(WEIGHTS),
        rank=jnp.full(CLIENTS, float(RANKS)),
        tail_energy=jnp.asarray(tail),
        bits=BITS[:, None] * (0.1 + jnp.maximum(jnp.arange(RANKS + 1), 1) / RANKS),
    )


def queues_of(queue_s, energy_queue_j=0.0):
    return {"queue_s": jnp.float32(queue_s), "energy_queue_j": jnp.float32(energy_queue_j)}


def simulate(controller, snr_hz):
    """The controller alone: latency, mean energy, dropped energy and both queues after each round, in float64."""

    def round_(state, snr_hz):
        decision = controller.allocate(state, observation(snr_hz))
        rate = uplink_rate(decision.share_hz, snr_hz)
        upload_s = BITS * (0.1 + decision.kept / RANKS) / rate
        latency_s, energy_j = jnp.max(START_S + upload_s), COMPUTE_J + POWER_W * jnp.mean(upload_s)
        kept = jnp.round(decision.kept).astype(jnp.int32)
        dropped = jnp.sum(WEIGHTS * jnp.asarray(TAIL)[jnp.arange(CLIENTS), kept])
        state, report = controller.update(state, Outcome(latency_s, energy_j))
        queues = (report.get(name, jnp.float32(0)) for name in ("queue_s", "energy_queue_j"))
        return state, (latency_s, energy_j, dropped, *queues)

    found = jax.jit(lambda snr_hz: jax.lax.scan(round_, controller.init(), snr_hz)[1])(snr_hz)
    return [np.float64(column) for column in found]


def law_holds(spent, queue, first, budget):
    """avg(spent) - budget <= (Q_T - Q_0) / T at every T, with the controller's own queue, up to its float32 rounding.

    The queue is that of float64 besides.
    """
    exact, sums = [], first
    for value in spent:
        sums = max(sums + value - budget, 0.0)
        exact.append(sums)
    np.testing.assert_allclose(queue, exact, rtol=1e-4, atol=1e-4)
    rounds = np.arange(1, len(spent) + 1)
    return (np.cumsum(spent) / rounds - budget <= (queue - first) / rounds + 1e-5 * budget).all()


def test_the_law_holds_from_the_longest_first_queue_of_a_plan():
    """Oracle: the law; float32 must still count rounds on top of that queue, to a thousandth of the budget."""
    first_s = float(rank_search.first_queue(jnp.float32(1e9), jnp.float32(0.3), 1.2))
    config = TsfaConfig(V=0.3, latency_budget_s=1.2, queue_s=first_s)
    latency_s, _, _, queue, _ = simulate(tsfa_online.make(config), gains(600))
    assert first_s > 1e3 * 1.2
    moved, due = queue - first_s, np.cumsum(latency_s - 1.2)
    assert (np.abs(moved - due) / np.arange(1, 601) < 1e-3 * 1.2).all()


@pytest.mark.parametrize("first_s", [0.0, 3.0])
def test_both_laws_hold_on_every_path_and_both_budgets_are_met(first_s):
    """Exact telescoping in float64; after 600 rounds each mean is within its queue over T of the budget, and binds."""
    snr_hz = gains(600)
    free = simulate(tsfa_online.make(TsfaConfig(V=0.3, latency_budget_s=1.2, queue_s=first_s)), snr_hz)
    budget_j = 0.8 * free[1].mean()
    config = TsfaConfig(V=0.3, latency_budget_s=1.2, energy_budget_j=budget_j, queue_s=first_s)
    bound = simulate(tsfa_online.make(config), snr_hz)
    assert law_holds(bound[0], bound[3], first_s, 1.2) and law_holds(bound[1], bound[4], 0.0, budget_j)
    assert law_holds(free[0], free[3], first_s, 1.2)
    np.testing.assert_array_equal(free[4], 0)
    assert bound[1].mean() < 1.05 * budget_j < free[1].mean()
    assert bound[0].mean() < 1.05 * 1.2 and bound[2].mean() > free[2].mean()


def test_without_a_budget_of_energy_its_queue_changes_nothing():
    """Invariance, bit for bit; and with a budget an empty queue does not either."""
    snr_hz = gains(1)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def decide(budget_j, energy_queue_j):
        config = TsfaConfig(V=1.0, latency_budget_s=1.0, energy_budget_j=budget_j)
        return tsfa_online.make(config).allocate(queues_of(1.0, energy_queue_j), observation(snr_hz))

    plain = decide(None, 0.0)
    for other in (decide(None, 9.0), decide(0.2, 0.0)):
        jax.tree.map(np.testing.assert_array_equal, plain, other)
    assert decide(0.2, 9.0).latency_s < plain.latency_s


def test_the_price_of_energy_is_its_slope_by_the_latency():
    """By hand: all end together, so that the mean energy of the uploads is p (n latency - sum of starts) / n."""
    seen = observation(gains(1)[0])
    snr_hz, options = seen.radio.snr_hz, TsfaConfig(latency_budget_s=6.0, energy_budget_j=2.0)
    allocation = min_max_latency(BITS, snr_hz, START_S, BAND_HZ)
    upload_s = BITS / np.float64(uplink_rate(allocation.bandwidth_hz, snr_hz))
    affine = POWER_W * (CLIENTS * float(allocation.latency_s) - START_S.sum()) / CLIENTS
    np.testing.assert_allclose(POWER_W * upload_s.mean(), affine, rtol=1e-4)
    price_s = tsfa_online.price_of_time(options, queues_of(1.5, 0.7), seen)
    np.testing.assert_allclose(price_s, 1.5 + 9 * 0.7 * POWER_W, rtol=1e-6)
    absent = seen._replace(weights=jnp.float32([0.5, 0.5, 0, 0]), radio=seen.radio._replace(snr_hz=snr_hz.at[1].set(0)))
    price_s = tsfa_online.price_of_time(options, queues_of(1.5, 0.7), absent)
    np.testing.assert_allclose(price_s, 1.5 + 9 * 0.7 * POWER_W / 2, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-36, 1e-6, 1e6, 1e36])
def test_relative_tails_do_not_know_the_unit_of_energy(scale):
    """Invariance: the decision is that of the same energies in another unit; the weighted mean of the whole is 1."""
    snr_hz = gains(1)[0]
    controller = tsfa_online.make(TsfaConfig(V=1.0))
    decide = jax.jit(lambda tail: controller.allocate(queues_of(2.0), observation(snr_hz, tail)))
    here, there = decide(TAIL), decide(TAIL * np.float32(scale))
    np.testing.assert_array_equal(here.kept, there.kept)
    np.testing.assert_allclose(there.objective, here.objective, rtol=1e-5)
    relative = common.relative_tail(TAIL * np.float32(scale), WEIGHTS)
    np.testing.assert_allclose(np.sum(WEIGHTS * relative[:, 0]), 1, rtol=1e-6)


def test_tails_of_zero_are_safe():
    """By definition: nothing to lose, so that with a queue the least is sent, and all is finite."""
    controller = tsfa_online.make(TsfaConfig(min_keep_ratio=0.5))
    decision = controller.allocate(queues_of(2.0), observation(gains(1)[0], TAIL * 0))
    np.testing.assert_allclose(decision.kept, 0.5 * RANKS)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in decision])).all()


@pytest.mark.parametrize("tail", ["energy", "relative"])
@pytest.mark.parametrize("budget_s", [0.6, 1.0, 1.6])
@pytest.mark.parametrize("seed", [1, 2])
def test_at_equal_budget_tsfa_drops_no_more_than_its_baselines(seed, budget_s, tail):
    """Dropped energy by definition; all may spend what TSFA spent on average, `uniform` by two ratios in turn."""
    snr_hz, V = gains(400, seed), 0.2 if tail == "energy" else 0.2 * np.sum(WEIGHTS * TAIL[:, 0])
    config = TsfaConfig(V=float(V), latency_budget_s=budget_s, tail=tail, queue_s=0.5)
    latency_s, _, dropped, *_ = simulate(tsfa_online.make(config), snr_hz)
    spent_s = latency_s.mean()
    assert spent_s < 1.01 * budget_s
    equal = [simulate(uniform.make(UniformConfig(keep_ratio=k / RANKS), CONTEXT), snr_hz) for k in range(1, RANKS + 1)]
    means = [(found[0].mean(), found[2].mean()) for found in equal]
    others = {}
    if means[0][0] <= spent_s:  # else not even the fewest bits fit
        others["uniform"] = np.interp(spent_s, *np.transpose(means))
    for options in (GreedyConfig(latency_budget_s=spent_s), ProportionalConfig(latency_budget_s=spent_s)):
        make = {"greedy": greedy.make, "proportional": proportional.make}[options.name]
        others[options.name] = simulate(make(options, CONTEXT), snr_hz)[2].mean()
    assert "uniform" in others or budget_s < 1.0
    for name, lost in others.items():
        assert dropped.mean() <= lost, name


STATES = gains(3, seed=5)
LEAST, STEP = BITS.astype(float) / RANKS, np.repeat(BITS[:, None].astype(float) / RANKS, RANKS - 1, 1)
BUDGET_S = 0.8


def static_problem():
    """Multiplier and optimum of `min E[cost]` with `E[latency] <= budget`: the dual, its rounds by tsfa_oracle.

    All start together, where a round is convex, so that there is no gap.
    """
    cost = WEIGHTS[:, None].astype(float) * -np.diff(TAIL)[:, 1:]

    def dual(multiplier):
        start = np.zeros(CLIENTS)
        found = [tsfa_oracle.solve(LEAST, STEP, cost / multiplier, snr, start, BAND_HZ, 60)[0] for snr in STATES]
        return multiplier * (np.mean(found) - BUDGET_S)

    best = optimize.minimize_scalar(
        lambda log: -dual(np.exp(log)), bounds=(-2, 4), method="bounded", options={"xatol": 1e-3}
    )
    return np.exp(best.x), -best.fun


@pytest.mark.slow
def test_queue_over_V_tends_to_the_multiplier_and_the_gap_falls_like_one_over_V():
    """The static problem by its dual in float64; the same channel states for every V.

    The gap of a round is what `cost + multiplier latency` exceeds its least value in that channel state, by
    tsfa_oracle: never negative, and free of the noise of the states drawn. Once the queue has settled its mean falls
    with slope -1 in V, under `E[(latency - budget)^2] / 2 V` (what the first rounds lose grows with V), and it is paid
    for: what the queue holds in the end is next to nothing a round.
    """
    multiplier, _ = static_problem()
    gain, start = WEIGHTS[:, None] * -np.diff(TAIL)[:, 1:] / multiplier, np.zeros(CLIENTS)
    least = [multiplier * tsfa_oracle.solve(LEAST, STEP, gain, snr, start, BAND_HZ, 120)[0] for snr in STATES]
    V, rounds, settling = np.float32([1.0, 2.0, 4.0, 8.0]), 400_000, 4_000
    drawn = np.random.default_rng(0).integers(len(STATES), size=rounds)

    @jax.jit
    @jax.vmap
    def run(V):
        def round_(queue, snr_hz):
            found = solve(BITS, snr_hz, jnp.zeros(CLIENTS), BAND_HZ, WEIGHTS, TAIL, queue, V)
            next_queue = jnp.maximum(queue + found.latency_s - BUDGET_S, 0.0)
            return next_queue, (found.objective - queue * found.latency_s, found.latency_s, next_queue)

        return jax.lax.scan(round_, jnp.float32(0.0), STATES[drawn])[1]

    cost, latency_s, queue = (np.float64(x) for x in run(V))
    gap = cost / V[:, None] + multiplier * latency_s - np.array(least)[drawn]
    assert (gap >= -1e-4 * np.array(least)[drawn]).all()
    settled = gap[:, settling:].mean(1)
    assert (settled <= ((latency_s[:, settling:] - BUDGET_S) ** 2).mean(1) / (2 * V)).all()
    slope = np.polyfit(np.log(V), np.log(settled), 1)[0]
    assert abs(slope + 1) < 0.1, slope
    np.testing.assert_allclose(queue[-1].mean() / V[-1], multiplier, rtol=0.02)
    held = queue[:, -1] / rounds
    assert (latency_s.mean(1) - BUDGET_S <= held + 1e-5).all()
    assert (held < 1e-3 * BUDGET_S).all()


@pytest.mark.parametrize("threshold", [0.05, 0.0])
def test_under_rayleigh_fading_a_budget_holds_for_good_just_where_deep_fades_are_let_go(threshold):
    """With a threshold every latency is under that of all at the threshold, by `min_max_latency`, and the queue is as
    long in each quarter of 8,000 rounds; without one the same draws exceed that, and the queue grows."""
    mean_hz, rounds, budget_s = np.array([1e8, 3e7, 1e7, 1e9]), 8_000, 0.8
    power = np.random.default_rng(3).exponential(1, (rounds, CLIENTS))
    drawn = np.float32(np.where(power < threshold, 0.0, power) * mean_hz)
    controller = tsfa_online.make(TsfaConfig(V=0.3, latency_budget_s=budget_s))

    def round_(queues, snr_hz):
        latency_s = controller.allocate(queues, observation(snr_hz)).latency_s
        queues, report = controller.update(queues, Outcome(latency_s, jnp.float32(0)))
        return queues, (latency_s, report["queue_s"])

    found = jax.jit(lambda snr_hz: jax.lax.scan(round_, controller.init(), snr_hz)[1])(drawn)
    latency_s, queue = (np.float64(x) for x in found)
    longest = float(min_max_latency(1.1 * BITS, np.float32(0.05 * mean_hz), START_S, BAND_HZ).latency_s)
    quarters = queue.reshape(4, -1).mean(1)
    if threshold:
        assert law_holds(latency_s, queue, 0.0, budget_s)
        assert latency_s.max() <= longest * 1.0001
        assert latency_s.mean() < 1.001 * budget_s and quarters.max() < 1.25 * quarters.min()
    else:
        assert latency_s.max() > 10 * longest
        assert latency_s.mean() > 1.1 * budget_s and quarters[-1] > 10 * quarters[0]


@pytest.mark.parametrize("clients", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_one_search_of_the_latency_suffices_for_many_clients(clients):
    """tsfa_oracle over a fine scan of the latency: none has a lower objective by 1e-4, with starts far apart."""
    rng = np.random.default_rng(clients)
    bits, snr_hz = 10 ** rng.uniform(5, 6.5, clients), 10 ** rng.uniform(7, 10, clients)
    start_s, weights = rng.uniform(0, 2, clients), rng.dirichlet(np.ones(clients))
    tail = np.cumsum(np.sort(rng.exponential(1, (clients, RANKS)), -1), -1)[:, ::-1]
    tail = np.concatenate([tail, np.zeros((clients, 1))], -1)
    for V in (0.3, 3.0):
        case = (np.float32(x) for x in (bits, snr_hz, start_s, 2e7, weights, tail, 1.0, V))
        found = float(jax.jit(solve)(*case).objective)
        step = np.repeat(bits[:, None] / RANKS, RANKS - 1, 1)
        gain = V * weights[:, None] * -np.diff(tail)[:, 1:]
        best = tsfa_oracle.solve(bits / RANKS, step, gain, snr_hz, start_s, 2e7, 120)[0]
        assert found <= best * (1 + 1e-4), V
