"""Controllers of one ratio against closed forms, `min_max_latency` alone, and invariance to who is absent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.control import FixedConfig, IdealConfig, UniformConfig, common, fixed, ideal, uniform
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Observation, Outcome, Radio
from fedjax_lora.core.numbers import fill, split
from fedjax_lora.wireless import min_max_latency

METHODS = {module.METHOD.name: module.METHOD for module in (ideal, uniform, fixed)}
CONTEXT = Context(num_clients=5, cohort_size=5)
SNR_HZ = jnp.array([2e9, 3e7, 5e8, 1e10, 6e7])
START_S = jnp.array([0.1, 0.4, 0.2, 0.3, 0.6])
FULL_BITS = jnp.array([3e6, 2e6, 2e6, 1e6, 4e6])
RANKS = 4
QUARTER = FULL_BITS / RANKS


def observation(weights=(0.3, 0.1, 0.2, 0.1, 0.3), snr_hz=SNR_HZ, start_s=START_S, whole_ranks=True):
    return Observation(
        radio=Radio(snr_hz, start_s, band_hz=jnp.float32(2e6), power_w=jnp.float32(0.01)),
        weights=jnp.array(weights),
        rank=jnp.full(5, float(RANKS)),
        tail_energy=jnp.zeros((5, RANKS + 1)),
        bits=FULL_BITS[:, None] * jnp.maximum(jnp.arange(RANKS + 1), 1) / RANKS,
        whole_ranks=whole_ranks,
    )


@functools.partial(jax.jit, static_argnames=("name", "whole_ranks"))
def decide(name, keep_ratio=0.25, **seen):
    """What a controller decides whose keep ratio is traced."""
    method = METHODS[name]
    structure, _ = split(method.options())
    controller = method.make(fill(structure, {"keep_ratio": keep_ratio}), CONTEXT)
    return controller.allocate(controller.init(), observation(**seen))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep_ratio", [0.25, 1.0])
def test_everybody_keeps_the_traced_ratio_of_its_ranks(name, keep_ratio):
    """By definition."""
    np.testing.assert_array_equal(decide(name, keep_ratio).kept, np.full(5, keep_ratio * RANKS))


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_traced(name):
    """Oracle: one compilation for two ratios, whose decisions differ."""
    method = METHODS[name]
    structure, numbers = split(method.options(keep_ratio=0.5))
    assert numbers == {"keep_ratio": 0.5}

    @functools.partial(jax.jit, static_argnums=0)
    def kept(structure, numbers):
        controller = method.make(fill(structure, numbers), CONTEXT)
        return controller.allocate(controller.init(), observation()).kept

    half, full = kept(structure, numbers), kept(*split(method.options(keep_ratio=1.0)))
    np.testing.assert_allclose(full, 2 * half)
    assert kept._cache_size() == 1


@pytest.mark.parametrize("name", ["ideal", "uniform"])
def test_equal_shares_go_to_the_present(name):
    """Closed form: a third of the band for each of three."""
    shares = decide(name, weights=(0.5, 0.0, 0.25, 0.25, 0.0)).share_hz
    np.testing.assert_allclose(shares, np.array([2, 0, 2, 2, 0]) * 1e6 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["ideal", "uniform"])
def test_who_cannot_be_heard_takes_no_share(name):
    """Closed form: a quarter of the band for each of the four who can."""
    shares = decide(name, snr_hz=SNR_HZ.at[1].set(0.0)).share_hz
    np.testing.assert_allclose(shares, np.array([1, 0, 1, 1, 1]) * 2e6 / 4, rtol=1e-6)


def test_fixed_shares_are_those_of_min_max_latency_at_the_traced_ratio():
    expected = min_max_latency(QUARTER, SNR_HZ, START_S, 2e6).bandwidth_hz
    np.testing.assert_allclose(decide("fixed").share_hz, expected, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.3, 0.49999, 0.1, 1.0])
@pytest.mark.parametrize("whole_ranks", [True, False])
def test_fixed_plans_with_the_bits_that_are_sent(ratio, whole_ranks):
    """Oracle: NumPy; who sends whole ranks rounds down to at least one, who does not sends in proportion."""
    ranks = max(np.floor(ratio * RANKS + 1e-4), 1) if whole_ranks else ratio * RANKS
    expected = min_max_latency(jnp.float32(ranks * QUARTER), SNR_HZ, START_S, 2e6).bandwidth_hz
    np.testing.assert_allclose(decide("fixed", ratio, whole_ranks=whole_ranks).share_hz, expected, rtol=1e-5)


def test_bits_between_whole_ranks_are_numpys_interpolation():
    """Each client's own table; below one rank the line between one and two goes on, for who has two."""
    rank, kept = np.array([4, 3, 2, 4, 1]), np.array([2.25, 3.0, 1.5, 0.5, 0.5])
    table = np.float32([[9, 9, 10, 14, 20], [5, 5, 7, 8, 8], [3, 3, 4, 4, 4], [6, 6, 8, 9, 9], [2, 2, 2, 2, 2]])
    seen = observation(whole_ranks=False)._replace(rank=jnp.float32(rank), bits=jnp.asarray(table))
    expected = [np.interp(k, np.arange(1, 5), row[1:]) for k, row in zip(kept, table, strict=True)]
    expected[3] = 6 - 0.5 * 2
    np.testing.assert_allclose(common.bits_at(seen, jnp.float32(kept)), expected, rtol=1e-6)


@pytest.mark.parametrize("why", ["absent", "no gain", "no start"])
def test_fixed_leaves_out_who_cannot_send(why):
    """Invariance: the others' shares are those of a cohort without client 1, and it gets nothing."""
    others = np.array([0, 2, 3, 4])
    weights = (0.3, 0.0 if why == "absent" else 0.1, 0.2, 0.1, 0.3)
    snr_hz = SNR_HZ.at[1].set(0.0) if why == "no gain" else SNR_HZ
    start_s = START_S.at[1].set(jnp.inf) if why == "no start" else START_S
    shares = decide("fixed", weights=weights, snr_hz=snr_hz, start_s=start_s).share_hz
    expected = min_max_latency(QUARTER[others], SNR_HZ[others], START_S[others], 2e6).bandwidth_hz
    np.testing.assert_allclose(shares[others], expected, rtol=1e-6)
    assert shares[1] == 0


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_cohort_gets_nothing(name):
    np.testing.assert_array_equal(decide(name, weights=(0.0,) * 5).share_hz, 0)


@pytest.mark.parametrize("name", METHODS)
def test_shares_sum_to_the_band(name):
    """Conservation."""
    np.testing.assert_allclose(np.sum(np.asarray(decide(name).share_hz, np.float64)), 2e6, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_there_is_no_queue_and_a_network_but_for_ideal(name):
    """By definition."""
    controller = METHODS[name].make(METHODS[name].options(), CONTEXT)
    assert controller.update(controller.init(), Outcome(jnp.float32(9), jnp.float32(1))) == ((), {})
    assert controller.over_the_air == (name != "ideal")


@pytest.mark.parametrize("config", [IdealConfig, UniformConfig, FixedConfig])
@pytest.mark.parametrize("keep_ratio", [0.0, 1.5, float("nan")])
def test_config_names_field_value_and_what_is_allowed(config, keep_ratio):
    with pytest.raises(ValueError) as error:
        config(keep_ratio=keep_ratio)
    assert str(error.value) == f"keep_ratio must be in (0, 1], got {keep_ratio!r}"
    with pytest.raises(ValueError, match=r"name must be '\w+', got 'tsfa'"):
        config(name="tsfa")
