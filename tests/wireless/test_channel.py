"""Path loss against reference vectors; random draws against moments and distributions in closed form."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_lora.core.units import db_to_linear, linear_to_db
from fedjax_lora.wireless import channel, geometry, uplink_rate

VECTORS = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "wireless.json").read_text())
DRAWS = 20_000


def draw(function, *args, seed=0):
    """`[DRAWS]` outcomes of one client's function, a key each."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return jax.jit(jax.vmap(lambda key: function(key, *args)))(keys)


@pytest.mark.parametrize("model", ["umi", "uma"])
@pytest.mark.parametrize("sight", ["los", "nlos"])
@pytest.mark.parametrize("distance", ["100", "500"])
def test_path_loss_matches_the_reference_vectors(model, sight, distance):
    loss = channel.path_loss_db(model, jnp.float32(distance), 3.5, jnp.bool_(sight == "los"))
    np.testing.assert_allclose(loss, VECTORS["path_loss_db"][model][sight][distance], atol=5e-5)


@pytest.mark.parametrize("model", ["umi", "uma"])
def test_los_probability_matches_the_reference_vectors(model):
    probability = VECTORS["path_loss_db"][model]["los_probability"]["100"]
    np.testing.assert_allclose(channel.los_probability(model, jnp.float32(100)), probability, rtol=1e-6)
    np.testing.assert_array_equal(channel.los_probability(model, jnp.array([1.0, 18.0])), 1)


def test_3gpp128_matches_its_closed_form():
    loss = channel.path_loss_db("3gpp128", jnp.array([35.0, 1000.0]), 3.5, jnp.bool_(True))
    np.testing.assert_allclose(loss, [128.1 + 37.6 * np.log10(0.035), 128.1], rtol=1e-6)


@pytest.mark.parametrize("model", ["umi", "uma"])
def test_path_loss_bends_without_a_jump_at_the_breakpoint(model):
    """Invariance: both pieces of TR 38.901 agree at the breakpoint, to what rounding of its slant allows."""
    distance = 4 * ((10 if model == "umi" else 25) - 1) * 0.5 * 3.5e9 / 299_792_458
    near, far = channel.path_loss_db(model, distance * jnp.array([0.9999, 1.0001]), 3.5, jnp.bool_(True))
    assert 0 <= far - near < 5e-3


def test_positions_are_uniform_in_area():
    """Kolmogorov-Smirnov against the closed form: |x|^2 and the angle are uniform."""
    x = np.asarray(draw(geometry.annulus_position, 35.0, 500.0), np.float64)
    area = (np.sum(x**2, axis=1) - 35**2) / (500**2 - 35**2)
    assert stats.kstest(np.clip(area, 0, 1), "uniform").pvalue > 0.01
    assert stats.kstest(np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi) + 0.5, "uniform").pvalue > 0.01
    assert area.min() > -1e-5 and area.max() < 1 + 1e-5


def test_shadowing_is_log_normal_with_its_deviation():
    """Kolmogorov-Smirnov against N(-path loss, 8 dB)."""
    gain = draw(channel.draw_mean_gain, "3gpp128", jnp.float32(200), 3.5, 8.0)
    shadow_db = np.asarray(linear_to_db(gain)) + 128.1 + 37.6 * np.log10(0.2)
    assert stats.kstest(shadow_db / 8, "norm").pvalue > 0.01


def test_share_of_line_of_sight_matches_its_probability_within_five_standard_errors():
    """Without shadowing the gain takes two values, one a branch."""
    gain_db = np.asarray(linear_to_db(draw(channel.draw_mean_gain, "umi", jnp.float32(100), 3.5, 0.0)))
    values = VECTORS["path_loss_db"]["umi"]
    seen = np.isclose(gain_db, -values["los"]["100"], atol=1e-3)
    assert np.allclose(gain_db[~seen], -values["nlos"]["100"], atol=1e-3)
    p = values["los_probability"]["100"]
    assert abs(seen.mean() - p) < 5 * np.sqrt(p * (1 - p) / DRAWS)


def test_rayleigh_power_is_exponential():
    """Kolmogorov-Smirnov against Exp(1)."""
    h = draw(channel.draw_fading, channel.fading_law("rayleigh", 0.0))
    assert h.dtype == jnp.complex64
    assert stats.kstest(np.abs(h) ** 2, "expon").pvalue > 0.01


@pytest.mark.parametrize("k_db", [0.0, 7.0])
def test_rician_envelope_is_rice_distributed(k_db):
    """Kolmogorov-Smirnov against SciPy's Rice law with b = sqrt(2 K) and unit mean power."""
    h = draw(channel.draw_fading, channel.fading_law("rician", k_db))
    k = db_to_linear(k_db)
    assert stats.kstest(np.abs(h), stats.rice(np.sqrt(2 * k), scale=np.sqrt(0.5 / (1 + k))).cdf).pvalue > 0.01


def test_no_fading_is_a_constant_one():
    law = channel.fading_law("none", 6.0)
    np.testing.assert_array_equal(draw(channel.draw_fading, law), 1)
    np.testing.assert_array_equal(draw(channel.step_fading, jnp.complex64(1), law, 0.7), 1)


@pytest.mark.parametrize("kind", ["rayleigh", "rician"])
def test_ar1_autocorrelation_is_a_power_of_the_correlation(kind):
    """Closed form rho^lag of the scattered part, within five standard errors of 1/sqrt(DRAWS); the law is kept."""
    law, rho, lags = channel.fading_law(kind, 3.0), 0.8, 3

    def path(key):
        keys = jax.random.split(key, lags + 1)

        def advance(h, key):
            h = channel.step_fading(key, h, law, rho)
            return h, h

        start = channel.draw_fading(keys[0], law)
        return jnp.append(start[None], jax.lax.scan(advance, start, keys[1:])[1])

    h = np.asarray(draw(path))
    scattered = (h - law.steady) / law.scatter
    correlation = np.mean(np.conj(scattered[:, :1]) * scattered, axis=0)
    np.testing.assert_allclose(correlation, rho ** np.arange(lags + 1), atol=5 / np.sqrt(DRAWS))
    np.testing.assert_allclose(np.mean(np.abs(h) ** 2, axis=0), 1, atol=5 / np.sqrt(DRAWS))
    np.testing.assert_allclose(np.mean(h, axis=0), law.steady, atol=5 * law.scatter / np.sqrt(DRAWS))


def test_ergodic_rayleigh_rates_match_the_reference_within_four_standard_errors():
    """Monte Carlo on a band of 1 Hz, where snr_hz is the signal-to-noise ratio."""
    h = draw(channel.draw_fading, channel.fading_law("rayleigh", 0.0), seed=1)
    for snr_db, expected in VECTORS["ergodic_rayleigh_rate"].items():
        rates = np.asarray(uplink_rate(1.0, db_to_linear(float(snr_db)) * jnp.abs(h) ** 2), np.float64)
        assert abs(rates.mean() - expected) < 4 * rates.std() / np.sqrt(DRAWS)
