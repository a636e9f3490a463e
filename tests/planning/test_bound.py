"""The bound's terms against NumPy in float64, its projection against least squares, and an exact quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Factors
from fedjax_lora.planning import bound
from fedjax_lora.planning.bound import Measured

MEASURED = Measured(*map(jnp.float32, (2.5, 0.3, 0.4, 0.7, 1.9, 0.2, 0.05)))


def factors(seed, n_in=7, rank=3, n_out=5):
    rng = np.random.default_rng(seed)
    a, b, gradient = (rng.normal(size=shape) for shape in ((n_in, rank), (rank, n_out), (n_in, n_out)))
    return a.astype(np.float32), b.astype(np.float32), gradient.astype(np.float32)


def test_terms_at_a_constant_rate_equal_the_formula_in_float64():
    gap, smoothness, share, step, movement, against_s, against_c = map(float, MEASURED)
    sparsification, covariance, rounds = 0.8, 1.7, 40
    rate = step * share
    expected = (
        2 * gap / (rate * rounds),
        2 * smoothness * movement / rate,
        2 * (against_s / rate**2 + 2 * smoothness / rate) * sparsification,
        2 * (against_c / rate**2 + 2 * smoothness / rate) * covariance,
    )
    found = bound.terms(MEASURED, sparsification, covariance, np.ones(rounds))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    np.testing.assert_allclose(found.total, sum(expected), rtol=1e-5)


def test_the_terms_of_a_log_are_a_loop_over_its_rounds():
    """Oracle: the formula round by round in float64; a round that was not measured counts neither up nor down."""
    gap, smoothness, share, step, movement, *against = map(float, MEASURED)
    factors, rate = np.array([1.0, 0.6, 0.2]), step * share
    errors = np.array([[0.5, np.nan, 1.5], [1.0, 2.0, 0.1]])
    expected = [2 * gap / (rate * 1.8), 2 * smoothness * movement / rate * (1 + 0.36 + 0.04) / 1.8]
    for theta, norms in zip(against, errors, strict=True):
        above = below = 0.0
        for phi, norm in zip(factors, norms, strict=True):
            if not np.isnan(norm):
                above += 2 * (theta / (phi * rate**2) + 2 * smoothness / rate) * norm**2
                below += phi
        expected.append(above / below)
    np.testing.assert_allclose(np.array(bound.of_log(MEASURED, *errors, factors)), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_unit_of_the_rate_does_not_matter(scale):
    """Invariance: factors in another unit of the rate, with what is measured per unit, are the same bound."""
    factors, errors = np.array([1.0, 0.6, 0.2]), np.array([0.5, 0.3, 1.5])
    other = MEASURED._replace(step=MEASURED.step / scale, movement=MEASURED.movement / scale**2)
    found, same = (bound.terms(m, errors, errors, f) for m, f in ((MEASURED, factors), (other, scale * factors)))
    np.testing.assert_allclose(np.array(found), np.array(same), rtol=1e-5)


def test_without_progress_the_bound_is_infinite():
    assert np.isinf(bound.terms(MEASURED._replace(step=jnp.float32(-0.1)), 0.0, 0.0, np.ones(40)).total)


def test_the_effect_of_the_rank_is_what_full_rank_would_save():
    """Oracle: the terms again with `kappa = 1`; the effects sum to the bound, and full rank costs nothing."""
    found = bound.terms(MEASURED, 0.8, 1.7, np.ones(40))
    full = MEASURED._replace(share=jnp.float32(1))
    best = bound.terms(full, 0.8, 1.7, np.ones(40))
    effects = bound.effects(MEASURED, found)
    saved = found.descent + found.noise - best.descent - best.noise
    np.testing.assert_allclose(effects.rank, saved, rtol=1e-5)
    np.testing.assert_allclose(sum(effects), found.total, rtol=1e-5)
    assert effects.rank > 0 and bound.effects(full, best).rank == 0
    endless = bound.terms(full._replace(step=jnp.float32(0)), 0.0, 0.0, np.ones(40))
    assert not np.isnan(np.array(bound.effects(full, endless))).any()


def test_the_followed_energy_is_that_of_the_projection_on_all_first_order_moves():
    """Oracle: least squares over a basis of `da b + a db`, in float64."""
    a, b, gradient = factors(0)
    moves = [np.outer(np.eye(7)[i], b[j]) for i in range(7) for j in range(3)]
    moves += [np.outer(a[:, j], np.eye(5)[i]) for i in range(5) for j in range(3)]
    basis = np.array(moves, np.float64).reshape(len(moves), -1).T
    projected = basis @ np.linalg.lstsq(basis, np.float64(gradient).ravel(), rcond=None)[0]
    np.testing.assert_allclose(bound.followed_energy(a, b, gradient), np.sum(projected**2), rtol=1e-4)


@pytest.mark.parametrize("trained", ["both", "a", "b"])
def test_what_is_followed_grows_with_the_rank_up_to_the_whole_gradient(trained):
    a, b, gradient = factors(1, rank=5)
    left, right = a * (trained != "a"), b * (trained != "b")
    masks = np.tril(np.ones((6, 5)), -1)
    found = np.array([bound.followed_energy(left * m, right * m[:, None], gradient) for m in masks])
    whole = np.sum(gradient**2)
    assert found[0] == 0 and (np.diff(found) > 0).all() and (found <= whole * 1.00001).all()
    if trained != "b":  # b's five rows span all of the outputs
        np.testing.assert_allclose(found[-1], whole, rtol=1e-5)


def test_a_start_at_zero_follows_what_the_other_factor_spans():
    """Oracle: with b = 0 and orthonormal columns of a, the energy of a^T G."""
    a, b, gradient = factors(2)
    a = np.linalg.qr(a)[0]
    found = bound.followed_energy(a, 0 * b, gradient)
    np.testing.assert_allclose(found, np.sum((a.T @ gradient) ** 2), rtol=1e-5)


def test_a_product_change_is_the_difference_of_products():
    (a, b, _), (c, d, _) = factors(3), factors(4)
    found = bound.product_change(
        Factors(jnp.array(a[None]), jnp.array(b[None])), Factors(jnp.array(c[None]), jnp.array(d[None]))
    )
    np.testing.assert_allclose(found[0], c @ d - a @ b, rtol=1e-4, atol=1e-5)


def test_the_smoothness_of_a_round_bowl_is_its_curvature():
    rng = np.random.default_rng(5)
    points, curvature = rng.normal(size=(4, 6)), 1.7
    moves = np.diff(points, axis=0)
    loss = curvature / 2 * np.sum(points**2, 1)
    slope = np.sum(curvature * points[:-1] * moves, 1)
    found = bound.smoothness(jnp.array(loss), jnp.array(slope), jnp.array(np.sum(moves**2, 1)))
    np.testing.assert_allclose(found, curvature, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "expected"), [([3.0, 0.0], 1.0), ([0.0, 2.0], 0.0), ([-1.0, 0.0], 0.0), ([3, 4], 0.36)]
)
def test_the_share_against_descent_is_a_squared_cosine(error, expected):
    gradient, error = np.array([2.0, 0.0]), np.array(error)
    found = bound.share_against(
        *(jnp.asarray(x, jnp.float32) for x in (gradient @ error, gradient @ gradient, error @ error))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "rise"])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_on_a_quadratic_where_every_constant_is_known(seed, schedule):
    """Half of the coordinates can be followed; movement has noise across the gradient, and errors come on top.

    Movement and errors shrink with the rate, as assumed; energies of the errors are those of ten rounds alone.
    """
    rng = np.random.default_rng(seed)
    dims, rounds, step = 20, 60, 0.05
    line = 1 - np.arange(rounds) / rounds
    factors = {"constant": np.ones(rounds), "linear": line, "rise": line[::-1]}[schedule]
    curvature = rng.uniform(0.2, 2.0, dims)
    can_follow = np.arange(dims) < dims // 2
    x, history = rng.normal(size=dims) * np.where(can_follow, 1.0, 0.05), []
    gap = 0.5 * np.sum(curvature * x**2)
    for phi in factors:
        gradient = curvature * x
        followed = gradient * can_follow
        noise = rng.normal(size=dims) * 0.02
        noise -= gradient * (gradient @ noise) / (gradient @ gradient)
        movement, errors = phi * (noise - step * followed), rng.normal(size=(2, dims)) * 0.01
        errors *= [[phi], [phi**2]]
        against = np.maximum(errors @ gradient, 0) ** 2 / (gradient @ gradient)
        norms = gradient @ gradient, followed @ followed, movement @ movement
        history.append((*norms, *np.sum(errors**2, 1), *against))
        x = x + movement + errors.sum(0)
    gradient_sq, followed_sq, movement_sq, s_sq, c_sq, along_s, along_c = np.array(history).T
    pilot = slice(10)
    measured = Measured(
        gap=jnp.float32(gap),
        smoothness=curvature.max(),
        share=np.min(followed_sq / gradient_sq),
        step=jnp.float32(step),
        movement=movement_sq.sum() / np.sum(factors**2),
        against_sparsification=along_s.sum() / s_sq.sum(),
        against_covariance=along_c.sum() / c_sq.sum(),
    )
    # As a pilot has them: energies at the peak of the rate.
    s_peak, c_peak = s_sq[pilot].sum() / np.sum(factors[pilot] ** 2), c_sq[pilot].sum() / np.sum(factors[pilot] ** 4)
    found = bound.terms(jax.tree.map(jnp.float32, measured), s_peak * factors**2, c_peak * factors**4, factors)
    mean = np.sum(factors * gradient_sq) / factors.sum()
    assert mean <= found.total <= 40 * mean


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("term", ["noise", "sparsification", "covariance"])
def test_without_any_one_of_its_terms_the_bound_would_not_hold(term, schedule):
    """On `||x||^2 / 2` by NumPy: noise lifts it from its minimum, an error undoes nine tenths of the descent."""
    rng = np.random.default_rng(0)
    rounds, step = 400, 0.01
    factors = {"constant": np.ones(rounds), "linear": 1 - np.arange(rounds) / rounds}[schedule]
    x = np.zeros(6) if term == "noise" else np.full(6, 6**-0.5)
    gap, gradient_sq, movement_sq, error_sq = 0.5 * x @ x, [], [], []
    for phi in factors:
        noise = 0.1 * rng.normal(size=6) if term == "noise" else np.zeros(6)
        if x.any():
            noise -= x * (x @ noise) / (x @ x)
        movement = phi * (noise - step * x)
        error = np.zeros(6) if term == "noise" else 0.9 * phi * step * x
        gradient_sq, movement_sq = [*gradient_sq, x @ x], [*movement_sq, movement @ movement]
        error_sq, x = [*error_sq, error @ error], x + movement + error
    measured = Measured(
        gap=gap,
        smoothness=1.0,
        share=1.0,
        step=step,
        movement=np.sum(movement_sq) / np.sum(factors**2),
        against_sparsification=1.0,
        against_covariance=1.0,
    )
    errors = {name: np.array(error_sq) if name == term else 0.0 for name in ("sparsification", "covariance")}
    found = bound.terms(jax.tree.map(jnp.float32, measured), **errors, factors=factors)
    mean = np.sum(factors * gradient_sq) / factors.sum()
    assert found.total - getattr(found, term) < mean <= found.total <= 10 * mean


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_without_noise_the_descent_is_that_of_gradient_flow_on_a_bowl(decay):
    """Closed form: f = x^2 / 2 from 1 falls by (1 - h phi_t)^2 a round. The descent term is twice the weighted mean of
    the squared gradient where all of the loss is gained and steps are short; the pilot has the first rounds alone."""
    step, factors = 1e-3, np.exp(-decay * np.arange(8000.0 if decay == 0 else 400.0))
    step = step if decay == 0 else 0.1
    x = np.cumprod(np.append(1.0, 1 - step * factors))
    mean = np.sum(factors * x[:-1] ** 2) / factors.sum()
    measured = MEASURED._replace(gap=jnp.float32(0.5), share=jnp.float32(1), smoothness=jnp.float32(0))
    pilot = slice(8)
    progress = np.sum(x[:-1][pilot] * -np.diff(x)[pilot])
    measured = measured._replace(step=jnp.float32(progress / np.sum(factors[pilot] * x[:-1][pilot] ** 2)))
    found = bound.terms(measured, 0.0, 0.0, factors)
    np.testing.assert_allclose(found.total, 2 * mean, rtol=0.06)
