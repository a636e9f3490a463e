"""The offline choice of rank and V against loops, brute force and the statics of a toy whose trade-off is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.control import tsfa_online
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.network import Observation, Radio
from fedjax_lora.core.numbers import fill
from fedjax_lora.planning import bound, rank_descent, rank_search
from fedjax_lora.planning.rank_search import Candidate, PlanConfig

RANKS, ROUNDS, CLIENTS = (1, 2, 3, 4), 5, 3
BAND_HZ = 2e7
CONFIG = TsfaConfig(latency_budget_s=1.0, min_keep_ratio=0.1)
FACTORS = jnp.array([1.0, 1.0, 0.9, 0.8, 0.7])  # of the learning rate


def candidate(rank: int) -> Candidate:
    """One rank of a spectrum that falls off by halves: what a rank adds is half of what the one before it did."""
    spectrum = 0.5 ** np.arange(max(RANKS)) * (np.arange(max(RANKS)) < rank)
    tail = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
    kept = np.clip(np.arange(max(RANKS) + 1), 1, rank)
    rng = np.random.default_rng(0)
    measured = bound.Measured(
        gap=jnp.float32(0.25),
        smoothness=jnp.float32(0.01),
        share=jnp.float32(spectrum.sum() / 2.0),
        step=jnp.float32(0.5),
        movement=jnp.float32(0.2 * rank),
        against_sparsification=jnp.float32(0.2),
        against_covariance=jnp.float32(0.1),
    )
    drawn = (2, ROUNDS, CLIENTS)
    return Candidate(
        measured=measured,
        rank=jnp.float32(rank),
        weights=jnp.full(CLIENTS, 1 / CLIENTS),
        tail_energy=jnp.float32(np.outer([1.0, 2.0, 0.5], tail)),
        bits=jnp.float32(5e5 + 2e6 * kept),
        sparsification=jnp.float32(tail[kept]),
        covariance=jnp.full(len(tail), 0.1),
        radio=Radio(
            snr_hz=jnp.float32(10 ** rng.uniform(6.5, 8, drawn)),
            start_s=jnp.float32(rng.uniform(0, 0.2, drawn)),
            band_hz=jnp.full(drawn[:2], BAND_HZ),
            power_w=jnp.full(drawn[:2], 0.01),
        ),
    )


def candidates(ranks=RANKS) -> Candidate:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(candidate, ranks))


def within(budget_s: float, config: TsfaConfig = CONFIG) -> TsfaConfig:
    return dataclasses.replace(config, latency_budget_s=budget_s)


def faded(own: Candidate, *places: tuple) -> Candidate:
    """The candidate where these clients of a path and a round cannot be heard."""
    snr_hz = own.radio.snr_hz
    for place in places:
        snr_hz = snr_hz.at[place].set(0.0)
    return own._replace(radio=own.radio._replace(snr_hz=snr_hz))


def best_rank(latency_s, score, budget_s, tolerance):
    return rank_search.best_rank(latency_s, score, rank_search.most_latency(latency_s, budget_s, tolerance))


@pytest.fixture(scope="module")
def searched():
    """Budget -> what the grid found, from loose to tight."""
    return {budget: rank_search.grid(within(budget), candidates(), FACTORS) for budget in (8.0, 4.0, 2.0, 1.0, 0.5)}


def foresee(config: TsfaConfig):
    """`(candidate, V, first queue) -> Forecast` at a budget of one second, in a program of its own."""

    @jax.jit
    def found(own, V, queue_s):
        return rank_search.forecast(tsfa_online.make, fill(config, {"V": V, "queue_s": queue_s}), own, FACTORS)

    return found


def decide_for(config: TsfaConfig, own: Candidate, V: float):
    """`(snr_hz, start_s, queue) -> Decision` of the controller at rank 3."""
    controller = tsfa_online.make(dataclasses.replace(config, V=V))
    return jax.jit(
        lambda snr_hz, start_s, queue_s: controller.allocate(
            {"queue_s": queue_s},
            Observation(
                radio=Radio(snr_hz, start_s, band_hz=jnp.float32(BAND_HZ), power_w=jnp.float32(0.01)),
                weights=own.weights,
                rank=jnp.full(CLIENTS, 3.0),
                tail_energy=own.tail_energy,
                bits=jnp.tile(own.bits, (CLIENTS, 1)),
            ),
        )
    )


@pytest.mark.parametrize(("first_queue_s", "most"), [(0.0, 1.0), (2.0, 1.0), (2.0, 0.7)])
def test_a_forecast_is_a_python_loop_over_rounds(first_queue_s, most):
    """Oracle: the controller called round by round, its queue and means kept in float64; in two rounds somebody cannot
    be heard, and does not count."""
    own, V, config = candidate(3), 0.7, dataclasses.replace(CONFIG, max_keep_ratio=most)
    own = faded(own, (0, 1, 2), (1, 3, slice(2)))
    decide = decide_for(config, own, V)
    latencies, kept, queues, errors = [], [], [], np.zeros(ROUNDS)
    for path in range(2):
        queue = first_queue_s
        for number, (snr_hz, start_s) in enumerate(zip(own.radio.snr_hz[path], own.radio.start_s[path], strict=True)):
            decision = decide(snr_hz, start_s, jnp.float32(queue))
            ranks = np.asarray(decision.kept).astype(int)
            latencies.append(float(decision.latency_s))
            heard = np.asarray(snr_hz) > 0
            kept.append(ranks[heard].mean())
            errors[number] += np.asarray(own.sparsification)[ranks[heard]].mean() / 2
            queue = max(queue + latencies[-1] - CONFIG.latency_budget_s, 0.0)
        queues.append(queue)
    found = foresee(config)(own, jnp.float32(V), jnp.float32(first_queue_s))
    assert 1.0 < np.mean(kept) < np.floor(3 * most)  # the queue does decide something
    np.testing.assert_allclose(found.latency_s, np.mean(latencies), rtol=1e-4)
    np.testing.assert_allclose(found.kept_ranks, np.mean(kept), rtol=1e-4)
    np.testing.assert_allclose(found.queue_s, first_queue_s)
    np.testing.assert_allclose(found.final_queue_s, np.mean(queues), rtol=1e-3)
    expected = bound.terms(own.measured, errors * FACTORS**2, 0.1 * FACTORS**4, FACTORS)
    np.testing.assert_allclose(found.terms, expected, rtol=1e-4)


def price_of(own: Candidate, budget_s: float, config: TsfaConfig = CONFIG):
    """In units of the budget over that of V."""
    options = within(budget_s, config)
    price = rank_search.latency_price(tsfa_online.make, options, own)
    return price * rank_search.unit_of_V(options, own) / budget_s


@pytest.mark.parametrize(("budget_s", "tail"), [(1.0, "relative"), (0.7, "relative"), (0.7, "energy")])
def test_at_the_price_of_latency_the_drawn_rounds_take_the_budget(budget_s, tail):
    """Oracle: the controller called round by round with the queue that stays; a little above the price it is within,
    below it exceeds."""
    own, config = faded(candidate(3), (0, 1, 2), (1, 3)), dataclasses.replace(CONFIG, tail=tail)  # one or none is heard
    unit = float(rank_search.unit_of_V(within(budget_s, config), own))
    V, price = 0.7, float(price_of(own, budget_s, config)) * budget_s / unit
    decide = decide_for(config, own, V)

    def mean_s(queue_s):
        rounds = zip(*(x.reshape(-1, CLIENTS) for x in own.radio[:2]), strict=True)
        return np.mean([float(decide(*drawn, jnp.float32(queue_s)).latency_s) for drawn in rounds])

    assert 1e-3 < price * unit / budget_s < 1e2
    assert mean_s(1.001 * price * V) <= budget_s * 1.0001 and mean_s(0.999 * price * V) > budget_s * 0.9999


def test_the_price_of_a_budget_that_all_meet_or_none_is_an_end():
    """By definition: nothing is to pay where all that may be sent is within the budget; else the largest that is tried.

    Where nothing is left out in any case, any price will do.
    """
    np.testing.assert_array_equal(price_of(candidate(3), 100.0), 0.0)
    np.testing.assert_allclose(price_of(candidate(3), 0.01), 1e4, rtol=1e-3)
    nothing = candidate(3)._replace(tail_energy=jnp.zeros((CLIENTS, len(RANKS) + 1)))
    for tail in ("energy", "relative"):
        assert 0 < price_of(nothing, 1.0, dataclasses.replace(CONFIG, tail=tail)) < 1.1e-4


def test_the_grid_is_brute_force(searched):
    """Oracle: each rank and V on its own, from the first queue that holds, then NumPy's least score in the budget."""
    one = foresee(CONFIG)
    latency, score = np.empty((2, len(RANKS), len(rank_search.WEIGHTS)))
    for i, rank in enumerate(RANKS):
        own = candidate(rank)
        unit = rank_search.unit_of_V(CONFIG, own)
        price = price_of(own, 1.0) / unit
        for j, weight in enumerate(rank_search.WEIGHTS):
            found = one(own, weight * unit, price * weight * unit)
            latency[i, j], score[i, j] = found.latency_s, found.score
    np.testing.assert_allclose(searched[1.0].latency_s, latency, rtol=1e-3)
    np.testing.assert_allclose(searched[1.0].score, score, rtol=1e-3)
    best = rank_search.best_V(searched[1.0], 1.05)
    allowed = np.where(latency <= 1.05, score, np.inf)
    feasible = np.isfinite(allowed).any(1)
    assert feasible.any()
    smallest = np.argmax(allowed <= 1.01 * allowed.min(1, keepdims=True), 1)  # V of nearly the least score
    np.testing.assert_allclose(best.score[feasible], allowed[range(len(RANKS)), smallest][feasible], rtol=1e-3)
    np.testing.assert_allclose(best.latency_s[~feasible], latency.min(1)[~feasible], rtol=1e-3)
    assert best_rank(best.latency_s, best.score, 1.0, 0.05) == np.argmin(allowed.min(1))


def test_where_no_score_is_finite_the_least_latency_is_taken(searched):
    """By hand: a pilot without progress gives infinite scores, of which none may be chosen for being the first."""
    found = searched[1.0]
    nothing = found._replace(score=jnp.full_like(found.score, jnp.inf))
    best = rank_search.best_V(nothing, 1.05)
    np.testing.assert_array_equal(best.latency_s, np.asarray(found.latency_s).min(1))
    latency_s = jnp.array([3.0, 1.0, 2.0])
    assert best_rank(latency_s, jnp.full(3, jnp.inf), 2.5, 0.0) == 1
    assert best_rank(latency_s, jnp.array([0.0, jnp.inf, 5.0]), 2.5, 0.0) == 2


@pytest.mark.parametrize(("budget_s", "expected"), [(9.0, 3), (2.05, 2), (2.0, 1), (1.5, 1), (0.1, 1)])
def test_where_no_rank_is_within_the_budget_the_best_near_the_least_latency_is_taken(budget_s, expected):
    """By hand: the second is 4 % slower than the first, and better; a budget under both is like one at the first."""
    latency_s, score = jnp.array([2.0, 2.08, 2.15, 8.0]), jnp.array([4.0, 3.0, 2.0, 1.0])
    assert best_rank(latency_s, score, budget_s, 0.05) == expected


@pytest.mark.parametrize(
    ("loss", "bound", "expected"),
    [
        (
            [[5.0, 9.0, 1.0], [4.9, 8.9, 0.9], [4.8, 8.8, 0.8]],
            [1, 2, 3],
            2,
        ),  # seeds differ by far more, but no pair does
        (
            [[5.6, 9.6, 1.6], [4.9, 8.9, 0.9], [4.5, 9.1, 0.9]],
            [1, 2, 3],
            1,
        ),  # 0.77 +- 0.18 and 0.07 +- 0.18 over the last
        ([[5.6, 9.6, 1.6], [4.9, 8.9, 0.9], [4.5, 9.1, 0.9]], [1, 3, 2], 2),
        ([[5.0, 9.0, 1.0], [5.0, 9.0, 1.0], [5.0, 9.0, 1.0]], [3, 1, 2], 1),
        ([[5.0], [4.9], [4.8]], [1, 2, 3], 2),  # one seed knows no error
        ([[5.0] * 4 + [50.0], [5.1] * 5, [5.0] * 5], [1, 3, 2], 2),  # 9 +- 9: astray, though its error is as large
        ([[5.0, 9.0, 1.0], [4.9, 8.9, 0.9], [4.8, 8.8, np.nan]], [3, 2, 1], 1),
        ([[5.6, 9.6, 1.6], [4.9, np.inf, 0.9], [4.5, 9.1, 0.9]], [1, 1, 2], 2),  # one that diverged is not as good
        ([[5.6, 9.6, 1.6], [4.9, 8.9, 0.9], [4.5, 9.1, 0.9]], [1, np.inf, np.inf], 2),  # where no bound is, the loss
        ([[np.inf], [np.nan], [np.nan]], [3, 2, 1], 0),  # nothing but the latency is left
    ],
)
def test_of_ranks_that_seeds_hardly_tell_apart_that_of_least_bound_is_taken(loss, bound, expected):
    """By hand, over pairs of equal seeds."""
    latency_s, loss, bound = jnp.array([1.0, 1.1, 1.2]), jnp.array(loss), jnp.float32(bound)
    assert rank_search.best_rank_by_seeds(latency_s, loss, bound, jnp.float32(1.3))[0] == expected


def test_noise_seldom_chooses_the_higher_rank_for_the_tighter_budget():
    """Two equal ranks under two budgets that do not matter, 400 times; beside the rule of the least mean loss."""
    latency_s, bound, most_s = jnp.ones(2), jnp.array([2.0, 1.0]), jnp.float32(1.0)
    losses = jnp.float32(1 + 0.1 * np.random.default_rng(0).normal(size=(400, 2, 2, 5)))

    def higher(choose):
        return sum(choose(tight) > choose(loose) for tight, loose in losses)

    by_least_loss = higher(lambda loss: rank_search.best_rank(latency_s, loss.mean(1), most_s))
    by_seeds = higher(lambda loss: rank_search.best_rank_by_seeds(latency_s, loss, bound, most_s)[0])
    assert by_least_loss > 60  # a quarter of 400, but for noise
    assert by_seeds < by_least_loss / 3


def test_the_seeds_choose_among_ranks_within_the_latency_alone():
    """By hand: the last would be best, the first as good as the second, but both take too long."""
    loss, score = jnp.array([[2.0, 2.1], [2.0, 2.0], [1.0, 1.0]]), jnp.array([1.0, 2.0, 0.0])
    chosen, excess = rank_search.best_rank_by_seeds(jnp.array([3.0, 1.0, 9.0]), loss, score, jnp.float32(2.0))
    assert chosen == 1
    np.testing.assert_allclose(excess.mean, [0.05, 0.0, -1.0], rtol=1e-5)
    np.testing.assert_allclose(excess.error, [0.05, 0.0, 0.0], rtol=1e-5)


def test_a_tighter_budget_never_chooses_a_higher_rank(searched):
    """Monotone comparative statics: of a nested spectrum, fewer bits cost a higher rank at least as much."""
    chosen = []
    for budget, found in searched.items():
        best = rank_search.best_V(found, 1.05 * budget)
        chosen.append(RANKS[best_rank(best.latency_s, best.score, budget, 0.05)])
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]  # and the budget does matter here


@pytest.mark.parametrize("budget", [4.0, 1.0])
def test_the_gradient_search_ends_within_one_candidate_of_the_grid(searched, budget):
    best = rank_search.best_V(searched[budget], 1.05 * budget)
    by_grid = best_rank(best.latency_s, best.score, budget, 0.05)
    found = rank_descent.gradient(within(budget), candidates(), FACTORS, 1.05 * budget)
    by_gradient = np.argmin(np.abs(np.log(RANKS) - np.log(found.rank)))
    assert abs(by_gradient - by_grid) <= 1
    assert found.history[0].min() < found.history[0, 0]  # the lower start is not where it ends


def test_the_gradient_search_leaves_the_largest_V_for_a_smaller_one_of_nearly_its_bound():
    """Oracle: the forecast itself, at the rank where the search ended, under the largest V and under the one found."""
    budget = 4.0
    found = rank_descent.gradient(within(budget), candidates(), FACTORS, 1.05 * budget)
    own, make, options = rank_descent.between(candidates(), found.rank), rank_descent.relaxed, within(budget)
    unit, price = rank_search.unit_of_V(options, own), rank_search.latency_price(make, options, own)
    largest, ended = (
        rank_search.forecast(make, rank_search.at_price(options, weight * unit, price), own, FACTORS).score
        for weight in (rank_search.WEIGHTS[-1], found.weight)
    )
    assert found.weight < 0.5 * rank_search.WEIGHTS[-1]
    assert ended < (1 + 2 * rank_search.NEAR) * largest


def test_a_first_queue_is_no_longer_than_float32_can_add_to():
    """By definition, up to the longest, on which a hundredth of a budget still counts."""
    queue_s = rank_search.first_queue(jnp.float32([0.5, 1e9]), jnp.float32(2.0), 3.0)
    assert queue_s[0] == 1 and queue_s[1] + jnp.float32(0.03) > queue_s[1]


def test_the_relaxed_search_differentiates_what_it_minimises():
    """Oracle: central differences of the score by rank and V."""

    def score(rank, V):
        own = rank_descent.between(candidates(), rank)
        options = fill(CONFIG, {"V": V, "queue_s": (0.3 + 0.1 * rank) * V})
        return rank_search.forecast(rank_descent.relaxed, options, own, FACTORS).score

    at, step = (2.6, 0.4), 0.01
    both = jax.jit(jax.value_and_grad(score, argnums=(0, 1)))
    slopes = both(*at)[1]
    for i in range(2):
        low, high = (both(*(x + sign * step * (i == j) for j, x in enumerate(at)))[0] for sign in (-1, 1))
        np.testing.assert_allclose(slopes[i], (high - low) / (2 * step), rtol=0.05)


def test_a_forecast_has_the_gradient_of_its_latency_by_budget_and_band():
    """Oracle: central differences, with V and first queue fixed. More budget lengthens rounds, more band shortens them.

    The queue never ends: where it does, the latency all but jumps.
    """

    def latency_s(budget_s, band_hz):
        own = candidate(3)
        own = own._replace(radio=own.radio._replace(band_hz=jnp.broadcast_to(band_hz, own.radio.band_hz.shape)))
        options = fill(CONFIG, {"latency_budget_s": budget_s, "V": jnp.float32(2.8), "queue_s": jnp.float32(4.0)})
        return rank_search.forecast(rank_descent.relaxed, options, own, FACTORS).latency_s

    at, steps = (0.8, BAND_HZ), (0.01, 0.01 * BAND_HZ)
    both = jax.jit(jax.value_and_grad(latency_s, argnums=(0, 1)))
    slopes = both(*at)[1]
    assert slopes[0] > 0 > slopes[1]
    for i, step in enumerate(steps):
        low, high = (both(*(x + sign * step * (i == j) for j, x in enumerate(at)))[0] for sign in (-1, 1))
        np.testing.assert_allclose(slopes[i], (high - low) / (2 * step), rtol=0.01)


def test_between_candidates_is_linear_and_at_one_it_is_that_one():
    between = jax.jit(rank_descent.between)
    for i, rank in enumerate(RANKS):
        found, expected = between(candidates(), jnp.float32(rank)), candidate(rank)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=str(i))
    halfway = between(candidates((2, 4)), jnp.float32(3.0))
    # Oracle: at ratio 1 everything is kept, whatever the rank.
    assert halfway.sparsification[3] == 0.0
    np.testing.assert_allclose(halfway.bits[3], 5e5 + 2e6 * 3, rtol=1e-6)
    np.testing.assert_allclose(halfway.measured.movement, 0.6, rtol=1e-6)


@pytest.mark.parametrize("rank", [1.5, 2.5, 3.01, 3.9])
def test_at_a_rank_between_whole_ones_everything_can_be_sent(rank):
    """By hand: with a V beyond measure all of 5e5 + 2e6 r bits are sent, so that nothing is left out."""

    @jax.jit
    def expected(rank):
        own, options = rank_descent.between(candidates(), rank), dataclasses.replace(CONFIG, V=1e9, queue_s=0.0)
        return rank_search.forecast(rank_descent.relaxed, options, own, FACTORS)

    found = expected(jnp.float32(rank))
    np.testing.assert_allclose(found.keep_ratio, 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.kept_ranks, rank, rtol=1e-5)
    np.testing.assert_allclose(found.uplink_bits, 5e5 + 2e6 * rank, rtol=1e-4)
    np.testing.assert_allclose(found.terms.sparsification, 0.0, atol=1e-4)


def test_rows_between_whole_positions_are_numpys_interpolation():
    table = np.random.default_rng(0).normal(size=(5, 2))
    positions = np.array([0.0, 0.3, 2.5, 4.0])
    found = rank_search.at(jnp.array(table), jnp.array(positions))
    expected = np.stack([np.interp(positions, range(5), column) for column in table.T], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_candidates_are_powers_of_two_and_the_maximum():
    assert rank_search.candidate_ranks(PlanConfig(), 12) == (1, 2, 4, 8, 12)
    assert rank_search.candidate_ranks(PlanConfig(), 8) == (1, 2, 4, 8)
    assert rank_search.candidate_ranks(PlanConfig(candidates=(3, 5)), 8) == (3, 5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("candidates", (4, 2), "increasing"),
        ("candidates", (0, 2), "at least 1"),
        ("objective", "loss", "bound, rollout"),
        ("search", "random", "grid, gradient"),
        ("pilot_rounds", 0, "at least 1"),
        ("paths", 0, "at least 1"),
        ("tolerance", -0.1, "at least 0"),
    ],
)
def test_a_mistake_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} must be .*{allowed}") as error:
        PlanConfig(**{field: value})
    assert str(value) in str(error.value)


def test_a_rollout_is_searched_by_grid():
    with pytest.raises(ValueError, match="search must be grid"):
        PlanConfig(objective="rollout", search="gradient")
