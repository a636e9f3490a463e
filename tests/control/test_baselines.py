"""Baseline controllers against closed forms, `min_max_latency` alone, and invariance to who is absent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.control import FixedConfig, IdealConfig, UniformConfig, fixed, ideal, uniform
from fedjax_lora.core.methods import Observation
from fedjax_lora.core.types import Hyper
from fedjax_lora.wireless import min_max_latency

CONTROLLERS = {"ideal": ideal(IdealConfig()), "uniform": uniform(UniformConfig()), "fixed": fixed(FixedConfig())}
SNR_HZ = jnp.array([2e9, 3e7, 5e8, 1e10, 6e7])
START_S = jnp.array([0.1, 0.4, 0.2, 0.3, 0.6])
FULL_BITS = jnp.array([3e6, 2e6, 2e6, 1e6, 4e6])


@functools.partial(jax.jit, static_argnames="name")
def decide(name, keep_ratio=0.25, weights=(0.3, 0.1, 0.2, 0.1, 0.3), snr_hz=SNR_HZ, start_s=START_S):
    one = jnp.float32(1)
    observation = Observation(
        snr_hz=snr_hz,
        start_s=start_s,
        weights=jnp.array(weights),
        tail_energy=jnp.zeros((5, 3)),
        rank=jnp.full(5, 2.0),
        payload_bits=lambda keep_ratio: keep_ratio * FULL_BITS,
        bandwidth_hz=jnp.float32(2e6),
        queue_s=jnp.float32(0),
        hyper=Hyper(rank=one, alpha=one, learning_rate=one, orthogonality=one, keep_ratio=keep_ratio),
    )
    return CONTROLLERS[name].decide(observation)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("keep_ratio", [0.25, 1.0])
def test_keep_ratio_is_the_traced_one_for_everybody(name, keep_ratio):
    """By definition: `Hyper.keep_ratio`, not the config's."""
    np.testing.assert_array_equal(decide(name, keep_ratio).keep_ratio, np.full(5, keep_ratio))


@pytest.mark.parametrize("name", ["ideal", "uniform"])
def test_equal_shares_go_to_the_present(name):
    """Closed form: a third of the band for each of three."""
    shares = decide(name, weights=(0.5, 0.0, 0.25, 0.25, 0.0)).bandwidth_hz
    np.testing.assert_allclose(shares, np.array([2, 0, 2, 2, 0]) * 1e6 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["ideal", "uniform"])
def test_who_cannot_be_heard_takes_no_share(name):
    """Closed form: a quarter of the band for each of the four who can."""
    shares = decide(name, snr_hz=SNR_HZ.at[1].set(0.0)).bandwidth_hz
    np.testing.assert_allclose(shares, np.array([1, 0, 1, 1, 1]) * 2e6 / 4, rtol=1e-6)


def test_fixed_shares_are_those_of_min_max_latency_at_the_traced_ratio():
    expected = min_max_latency(0.25 * FULL_BITS, SNR_HZ, START_S, 2e6).bandwidth_hz
    np.testing.assert_allclose(decide("fixed").bandwidth_hz, expected, rtol=1e-6)


@pytest.mark.parametrize("why", ["absent", "no gain", "no start"])
def test_fixed_leaves_out_who_cannot_send(why):
    """Invariance: the others' shares are those of a cohort without client 1, and it gets nothing."""
    others = np.array([0, 2, 3, 4])
    weights = (0.3, 0.0 if why == "absent" else 0.1, 0.2, 0.1, 0.3)
    snr_hz = SNR_HZ.at[1].set(0.0) if why == "no gain" else SNR_HZ
    start_s = START_S.at[1].set(jnp.inf) if why == "no start" else START_S
    shares = decide("fixed", weights=weights, snr_hz=snr_hz, start_s=start_s).bandwidth_hz
    expected = min_max_latency(0.25 * FULL_BITS[others], SNR_HZ[others], START_S[others], 2e6).bandwidth_hz
    np.testing.assert_allclose(shares[others], expected, rtol=1e-6)
    assert shares[1] == 0


@pytest.mark.parametrize("name", CONTROLLERS)
def test_an_empty_cohort_gets_nothing(name):
    np.testing.assert_array_equal(decide(name, weights=(0.0,) * 5).bandwidth_hz, 0)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_shares_sum_to_the_band(name):
    """Conservation."""
    np.testing.assert_allclose(np.sum(np.asarray(decide(name).bandwidth_hz, np.float64)), 2e6, rtol=1e-6)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_queue_stays(name):
    assert CONTROLLERS[name].update_queue(jnp.float32(3), jnp.float32(9)) == 3


@pytest.mark.parametrize("config", [IdealConfig, UniformConfig, FixedConfig])
@pytest.mark.parametrize("keep_ratio", [0.0, 1.5, float("nan")])
def test_config_names_field_value_and_what_is_allowed(config, keep_ratio):
    with pytest.raises(ValueError) as error:
        config(keep_ratio=keep_ratio)
    assert str(error.value) == f"keep_ratio must be in (0, 1], got {keep_ratio!r}"
    with pytest.raises(ValueError, match=r"name must be '\w+', got 'tsfa'"):
        config(name="tsfa")
