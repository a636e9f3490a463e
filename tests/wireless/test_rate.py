"""Rates against float64 closed forms, bisection, reference vectors and finite differences."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core import units
from fedjax_lora.wireless import rayleigh_outage, required_bandwidth, uplink_rate
from fedjax_lora.wireless.rate import marginal_rates, spectral_efficiency
from oracles import wireless_oracle

VECTORS = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "wireless.json").read_text())
ROWS = VECTORS["required_bandwidth"]


def gap64(t):
    """k(t) = t - log1p(t) in float64, by six terms of its series where the difference would cancel."""
    series = sum((-t) ** n / n for n in range(2, 8))
    return np.where(np.abs(t) < 1e-2, series, t - np.log1p(np.where(np.abs(t) < 1e-2, 1.0, t)))


@pytest.mark.parametrize("row", ROWS[:5])
def test_required_bandwidth_matches_the_reference_vectors(row):
    np.testing.assert_allclose(required_bandwidth(row["rate_bps"], row["snr_hz"]), row["bandwidth_hz"], rtol=5e-7)


def test_required_bandwidth_near_the_ceiling_matches_the_reference_vector():
    """The input's own float32 rounding, 6e-8 of a slack of 1e-3, allows no better than 1e-4."""
    row = ROWS[5]
    np.testing.assert_allclose(required_bandwidth(row["rate_bps"], row["snr_hz"]), row["bandwidth_hz"], rtol=2e-4)


def test_rate_of_the_reference_bandwidth_is_the_reference_rate():
    rate, snr, band = (np.array([row[name] for row in ROWS]) for name in ("rate_bps", "snr_hz", "bandwidth_hz"))
    np.testing.assert_allclose(uplink_rate(band, snr), rate, rtol=5e-7)


def test_rate_matches_the_float64_closed_form_over_eighteen_decades():
    band, snr = 2e4, 2e4 * np.logspace(-9, 9, 37)
    np.testing.assert_allclose(uplink_rate(band, snr), wireless_oracle.rate(band, snr), rtol=5e-7)


def test_efficiency_matches_the_float64_closed_form_with_load_and_slack_apart():
    """With s = c/b: load = log1p(s)/s, slack = k(s)/s, efficiency = log1p(s), down to a slack of 5e-10."""
    s = np.logspace(-9, 20, 291)
    efficiency = spectral_efficiency(jnp.float32(np.log1p(s) / s), jnp.float32(gap64(s) / s))
    np.testing.assert_allclose(efficiency, np.log1p(s), rtol=2e-6)


def test_required_bandwidth_matches_float64_bisection_within_conditioning():
    """Relative error times the slack 1 - R ln2/c stays at float32's rounding."""
    rng = np.random.default_rng(0)
    snr = np.float32(10 ** rng.uniform(3, 11, 300))
    slack = 10 ** rng.uniform(-4, -0.01, 300)
    rate = np.float32((1 - slack) * snr / np.log(2))
    expected = wireless_oracle.required_bandwidth(np.float64(rate), np.float64(snr))
    error = np.abs(required_bandwidth(rate, snr) / expected - 1)
    assert np.max(error * slack) < 4e-7
    assert np.max(error[slack > 0.5]) < 2e-6


def test_required_bandwidth_then_rate_is_a_round_trip():
    rate = np.float32(np.logspace(0, 9, 50))
    snr = np.float32(rate * np.logspace(6, 0, 50))
    np.testing.assert_allclose(uplink_rate(required_bandwidth(rate, snr), snr), rate, rtol=2e-6)


def test_required_bandwidth_at_its_edges():
    """By definition: nothing for no rate, inf at the ceiling, above it, and without gain."""
    ceiling = 3e6 / np.log(2)
    band = required_bandwidth(
        jnp.array([0.0, 0.0, 1.0, 1.001 * ceiling, 2 * ceiling]), jnp.array([3e6, 0, 0, 3e6, 3e6])
    )
    np.testing.assert_array_equal(band, [0, 0, np.inf, np.inf, np.inf])
    slopes = jax.jit(jax.vmap(jax.grad(required_bandwidth, (0, 1))))(
        jnp.array([0.0, 1.0, 9e9]), jnp.array([3e6, 0.0, 3e6])
    )
    np.testing.assert_array_equal(slopes, 0)


def test_rate_at_its_edges():
    """By definition 0 without bandwidth or gain; the rate stays finite on a vanishing band."""
    np.testing.assert_array_equal(uplink_rate(jnp.array([0.0, 0.0, 5.0]), jnp.array([3e6, 0.0, 0.0])), 0)
    np.testing.assert_array_equal(jax.grad(uplink_rate, (0, 1))(0.0, 3e6), 0)
    assert np.isfinite(jax.grad(uplink_rate, (0, 1))(1e-36, 1e12)).all()
    assert np.isfinite(uplink_rate(1e-36, 1e12))


def test_marginal_rates_match_float64_closed_forms():
    s = np.logspace(-8, 12, 201)
    by_band, by_snr = marginal_rates(jnp.full(201, 7.0), jnp.float32(7 * s))
    np.testing.assert_allclose(by_band, gap64(-s / (1 + s)) / np.log(2), rtol=3e-6)
    np.testing.assert_allclose(by_snr, 1 / (1 + s) / np.log(2), rtol=1e-6)


@pytest.mark.parametrize(("function", "oracle"), [(uplink_rate, "rate"), (required_bandwidth, "required_bandwidth")])
def test_gradients_match_float64_finite_differences(function, oracle):
    oracle = getattr(wireless_oracle, oracle)
    x, snr, h = np.array([2e5, 2e6, 2e7]), np.array([3e6, 2e9, 1.6e7]), 1e-5
    by_x, by_snr = jax.jit(jax.vmap(jax.grad(function, (0, 1))))(jnp.float32(x), jnp.float32(snr))
    np.testing.assert_allclose(by_x, (oracle(x * (1 + h), snr) - oracle(x * (1 - h), snr)) / (2 * h * x), rtol=1e-4)
    difference = (oracle(x, snr * (1 + h)) - oracle(x, snr * (1 - h))) / (2 * h * snr)
    np.testing.assert_allclose(by_snr, difference, rtol=1e-4)


def test_gradients_broadcast_like_the_function():
    """Chain rule by hand: a shared gain collects the sum of the elements' partials."""
    band = jnp.array([1e5, 3e5, 2e6])
    shared = jax.grad(lambda snr: uplink_rate(band, snr).sum())(4e6)
    apart = jax.vmap(jax.grad(uplink_rate, 1))(band, jnp.full(3, 4e6))
    np.testing.assert_allclose(shared, apart.sum(), rtol=1e-6)


def test_jit_and_vmap_equal_eager():
    rate, snr = jnp.array([0.0, 1e5, 3e6, 1e9]), jnp.array([1e6, 1e6, 1e9, 1e6])
    np.testing.assert_allclose(jax.jit(required_bandwidth)(rate, snr), required_bandwidth(rate, snr), rtol=1e-6)
    looped = [required_bandwidth(r, c) for r, c in zip(rate, snr, strict=True)]
    np.testing.assert_allclose(jax.vmap(required_bandwidth)(rate, snr), looped, rtol=1e-6)


def test_outage_matches_monte_carlo_within_five_standard_errors():
    rate, band, snr, draws = 3e6, 5e5, 6e7, 200_000
    gain = jax.random.exponential(jax.random.key(0), (draws,))
    expected = float(rayleigh_outage(rate, band, snr))
    failed = np.mean(np.asarray(uplink_rate(band, snr * gain)) < rate)
    assert abs(failed - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)


def test_outage_at_its_edges():
    """By definition: never without a rate, always without band or gain, and certain at an absurd rate."""
    outage = rayleigh_outage(jnp.array([0, 0, 1, 1, 1e12]), jnp.array([0, 1, 0, 1, 1]), jnp.array([0, 1, 1, 0, 1]))
    np.testing.assert_array_equal(outage, [0, 0, 1, 1, 1])


def test_decibels_match_closed_forms():
    np.testing.assert_allclose(units.dbm_to_watt(10.0), 0.01, rtol=1e-12)
    np.testing.assert_allclose(units.THERMAL_NOISE_W_PER_HZ, VECTORS["noise_density_w_per_hz"], rtol=1e-12)
    values = jnp.array([-130.0, 0.0, 3.0])
    np.testing.assert_allclose(units.db_to_linear(values), [1e-13, 1, 10**0.3], rtol=5e-6)
    np.testing.assert_allclose(units.linear_to_db(units.db_to_linear(values)), values, atol=2e-5)
