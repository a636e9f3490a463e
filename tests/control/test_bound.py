"""The bound's terms against NumPy in float64, its projection against least squares, and an exact quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.base import Factors
from fedjax_lora.control import bound
from fedjax_lora.control.bound import Measured

MEASURED = Measured(*map(jnp.float32, (2.5, 0.3, 0.4, 0.7, 1.9, 0.2, 0.05)))


def factors(seed, n_in=7, rank=3, n_out=5):
    rng = np.random.default_rng(seed)
    a, b, gradient = (rng.normal(size=shape) for shape in ((n_in, rank), (rank, n_out), (n_in, n_out)))
    return a.astype(np.float32), b.astype(np.float32), gradient.astype(np.float32)


def test_terms_equal_the_formula_in_float64():
    gap, smoothness, share, step, movement, against_s, against_c = map(float, MEASURED)
    sparsification, covariance, rounds = 0.8, 1.7, 40
    rate = step * share
    expected = (
        2 * gap / (rate * rounds),
        2 * smoothness * movement / rate,
        2 * (against_s / rate**2 + 2 * smoothness / rate) * sparsification,
        2 * (against_c / rate**2 + 2 * smoothness / rate) * covariance,
    )
    found = bound.terms(MEASURED, sparsification, covariance, rounds)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    np.testing.assert_allclose(found.total, sum(expected), rtol=1e-5)


def test_the_terms_of_a_log_are_those_of_its_mean_squares():
    """Oracle: NumPy's mean over the rounds that were measured."""
    sparsification, covariance = np.array([0.5, np.nan, 1.5]), np.array([1.0, 2.0, 0.1])
    found = bound.of_log(MEASURED, jnp.array(sparsification), jnp.array(covariance), 40)
    expected = bound.terms(MEASURED, np.nanmean(sparsification**2), np.mean(covariance**2), 40)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6)


def test_without_progress_the_bound_is_infinite():
    assert np.isinf(bound.terms(MEASURED._replace(step=jnp.float32(-0.1)), 0.0, 0.0, 40).total)


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


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_on_a_quadratic_where_every_constant_is_known(seed):
    """Half of the coordinates can be followed; movement has noise across the gradient, and errors come on top."""
    rng = np.random.default_rng(seed)
    dims, rounds, step = 20, 60, 0.05
    curvature = rng.uniform(0.2, 2.0, dims)
    can_follow = np.arange(dims) < dims // 2
    x, history = rng.normal(size=dims) * np.where(can_follow, 1.0, 0.05), []
    gap = 0.5 * np.sum(curvature * x**2)
    for _ in range(rounds):
        gradient = curvature * x
        followed = gradient * can_follow
        noise = rng.normal(size=dims) * 0.02
        noise -= gradient * (gradient @ noise) / (gradient @ gradient)
        movement, errors = -step * followed + noise, rng.normal(size=(2, dims)) * 0.01
        against = np.maximum(errors @ gradient, 0) ** 2 / (gradient @ gradient)
        norms = gradient @ gradient, followed @ followed, movement @ movement
        history.append((*norms, *np.sum(errors**2, 1), *against))
        x = x + movement + errors.sum(0)
    gradient_sq, followed_sq, movement_sq, s_sq, c_sq, along_s, along_c = np.array(history).T
    measured = Measured(
        gap=jnp.float32(gap),
        smoothness=curvature.max(),
        share=np.min(followed_sq / gradient_sq),
        step=jnp.float32(step),
        movement=movement_sq.mean(),
        against_sparsification=along_s.sum() / s_sq.sum(),
        against_covariance=along_c.sum() / c_sq.sum(),
    )
    found = bound.terms(jax.tree.map(jnp.float32, measured), s_sq.mean(), c_sq.mean(), rounds)
    assert gradient_sq.mean() <= found.total <= 40 * gradient_sq.mean()
