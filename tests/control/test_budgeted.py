"""Greedy and proportional control against brute force over ratios in float64, and their edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.control import GreedyConfig, ProportionalConfig, greedy, proportional
from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Observation, Outcome, Radio
from fedjax_lora.core.numbers import fill, split
from oracles import wireless_oracle

RANKS, BAND = 8, 2e6
SNR_HZ = np.array([2e9, 3e7, 5e8, 1e10, 6e7])
START_S = np.array([0.1, 0.4, 0.2, 0.3, 0.6])
BITS = np.array([3e6, 2e6, 2e6, 1e6, 4e6])
METHODS = {module.METHOD.name: module.METHOD for module in (greedy, proportional)}
CONTEXT = Context(num_clients=5, cohort_size=5)


def decide(name, budget_s, weights=(0.3, 0.1, 0.2, 0.1, 0.3), snr_hz=SNR_HZ, least=0.2, rank=RANKS, most=1.0):
    """Kept ranks and shares, with the numbers of the options traced."""
    method = METHODS[name]
    options = method.options(latency_budget_s=budget_s, min_keep_ratio=least, max_keep_ratio=most)
    structure, numbers = split(options)

    @jax.jit
    def run(numbers, weights, snr_hz):
        controller = method.make(fill(structure, numbers), CONTEXT)
        observation = Observation(
            radio=Radio(snr_hz, jnp.float32(START_S), band_hz=jnp.float32(BAND), power_w=jnp.float32(0.01)),
            weights=weights,
            rank=jnp.full(5, float(rank)),
            tail_energy=jnp.zeros((5, RANKS + 1)),
            bits=jnp.clip(jnp.arange(RANKS + 1.0), 1, rank) / rank * jnp.float32(BITS)[:, None],
        )
        return controller.allocate(controller.init(), observation)

    return run(numbers, jnp.float32(weights), jnp.float32(snr_hz))


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("budget_s", [0.5, 1.0, 1.6, 50.0])
def test_greedy_takes_the_largest_common_ratio_that_fits(budget_s, rank):
    """Float64 least latency of every whole rank; at 0.5 s nothing fits, since one client starts after it."""
    latency = {
        k: wireless_oracle.min_max_latency(k / rank * BITS, SNR_HZ, START_S, BAND)[0] for k in range(1, rank + 1)
    }
    fitting = [k for k, value in latency.items() if value <= budget_s]
    expected = max([int(np.ceil(0.2 * rank)), *fitting])
    decision = decide("greedy", budget_s, rank=rank)
    np.testing.assert_array_equal(decision.kept, expected)
    np.testing.assert_allclose(decision.latency_s, latency[expected], rtol=1e-5)
    np.testing.assert_allclose(np.sum(np.float64(decision.share_hz)), BAND, rtol=1e-6)


@pytest.mark.parametrize("budget_s", [0.5, 1.0, 1.6, 50.0])
def test_proportional_shares_follow_need_and_ratios_the_budget(budget_s):
    """The definition in NumPy: need is full bits over the rate of the equal split."""
    need = BITS / wireless_oracle.rate(BAND / 5, SNR_HZ)
    share = BAND * need / need.sum()
    ends = (
        START_S[:, None]
        + np.arange(1, RANKS + 1) / RANKS * BITS[:, None] / wireless_oracle.rate(share, SNR_HZ)[:, None]
    )
    kept = np.clip((ends <= budget_s).sum(1), 2, RANKS)
    decision = decide("proportional", budget_s)
    np.testing.assert_allclose(decision.share_hz, share, rtol=1e-5)
    np.testing.assert_array_equal(decision.kept, kept)
    np.testing.assert_allclose(decision.latency_s, ends[np.arange(5), kept - 1].max(), rtol=1e-5)


@pytest.mark.parametrize("most", [0.7, 0.3, 0.21])
@pytest.mark.parametrize("name", METHODS)
def test_nobody_keeps_more_than_the_largest_ratio(name, most):
    """The decision without that limit, cut to the whole ranks within it, but not under the least: 2 of 8."""
    free, limited = decide(name, 1.6), decide(name, 1.6, most=most)
    np.testing.assert_array_equal(limited.kept, np.minimum(free.kept, max(np.floor(most * RANKS), 2)))
    assert limited.latency_s <= free.latency_s


@pytest.mark.parametrize("name", METHODS)
def test_who_cannot_send_is_left_out(name):
    """Invariance: absent or without gain, it gets nothing, and the latency stays finite."""
    silent = np.where(np.arange(5) == 1, 0, SNR_HZ)
    absent = decide(name, 1.2, weights=(0.3, 0.0, 0.2, 0.1, 0.3))
    mute = decide(name, 1.2, snr_hz=silent)
    for decision in (absent, mute):
        assert decision.share_hz[1] == 0 and np.isfinite(decision.latency_s)
    np.testing.assert_allclose(absent.share_hz, mute.share_hz, rtol=1e-5)
    nobody = decide(name, 1.2, weights=(0.0,) * 5)
    np.testing.assert_array_equal(nobody.share_hz, 0)
    assert nobody.latency_s == 0 and np.isfinite(nobody.kept).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_queue_holds_what_exceeds_the_budget(name):
    """By hand: 1.5 s and 0.2 s under a budget of 1 s."""
    controller = METHODS[name].make(METHODS[name].options(latency_budget_s=1.0), CONTEXT)
    state = controller.init()
    for latency_s, expected in ((1.5, 0.5), (1.2, 0.7), (0.1, 0.0)):
        state, report = controller.update(state, Outcome(jnp.float32(latency_s), jnp.float32(0)))
        assert report.keys() == {"queue_s"}
        np.testing.assert_allclose(report["queue_s"], expected, rtol=1e-5)


@pytest.mark.parametrize("config", [GreedyConfig, ProportionalConfig])
def test_config_names_field_and_value(config):
    for field, value in (
        ("name", "tsfa"),
        ("latency_budget_s", 0.0),
        ("min_keep_ratio", 1.5),
        ("max_keep_ratio", 0.05),
    ):
        with pytest.raises(ValueError, match=rf"^{field} must be .*, got {value!r}$"):
            config(**{field: value})
