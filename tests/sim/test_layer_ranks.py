"""Rounds in which layers differ in their ranks and scales, on the toy simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.app import planner
from fedjax_lora.config.experiment import ConfigError
from toy import config, parts, simulation

WIDTH = {"query": (64, 64), "up": (64, 256)}
PATTERN = "lora={rank_pattern: {0.attention.q_proj: 1, '.*[.]2[.].*': 4}, alpha_pattern: {fc1: 5}}"
RANKS = {"query": [1, 3, 4, 3], "up": [3, 3, 4, 3]}
"""By `PATTERN`, where the others have the rank 3 of `toy.SETTINGS`."""


def bits_of(sim, state, layers=range(4), most=4, head=True):
    """Of all components and of the head, in float32."""
    values = sum(
        min(RANKS[name][layer], most) * (n_in + n_out) for name, (n_in, n_out) in WIDTH.items() for layer in layers
    )
    return 32 * (values + head * sum(leaf.size for leaf in state.adapters.head.values()))


def lacks(factors, name):
    """What of the factors is of components that the layers do not have."""
    for layer, rank in enumerate(RANKS[name]):
        yield from (factors.a[layer, :, rank:], factors.b[layer, rank:])


def test_each_layer_is_trained_sent_and_charged_in_its_own_rank():
    """Oracle: counts by the ranks of the layers; of what is merged, the smaller of stack and matrix of each layer."""
    sim = simulation(PATTERN, "sparsifier=dense", "aggregation=fedex", "clients.count=2")
    start = sim.init(jax.random.key(0))
    after, metrics = sim.run(start, 2)
    whole = bits_of(sim, start)
    more = 32 * sum(
        min(n_in * n_out, 2 * rank * (n_in + n_out)) for name, (n_in, n_out) in WIDTH.items() for rank in RANKS[name]
    )
    np.testing.assert_array_equal(metrics.client_uplink_bits, whole)
    np.testing.assert_array_equal(metrics.client_downlink_bits, [[whole] * 2, [whole + more] * 2])
    np.testing.assert_allclose(metrics.kept_ranks_mean, np.mean([*RANKS["query"], *RANKS["up"]]))
    for name, factors in after.adapters.modules.items():
        assert not any(map(np.any, lacks(factors, name)))
        for layer, rank in enumerate(RANKS[name]):
            assert np.all(np.abs(factors.b[layer, :rank]).max(-1) > 0)
            assert np.all(np.asarray(start.adapters.modules[name].a != factors.a)[layer, :, :rank].any(0))


def test_clients_of_fewer_ranks_have_these_of_each_layer():
    """Oracle: counts; control keeps some of the components, whose index is a bitmap of R or two bits for each."""
    sim = simulation(PATTERN, "lora.client_ranks=[3, 2]", "server=adam", "control={name: fixed, keep_ratio: 1.0}")
    state, metrics = sim.run(sim.init(jax.random.key(0)), 1)
    down = [bits_of(sim, state, most=rank) for rank in (3, 2)]
    np.testing.assert_array_equal(metrics.client_downlink_bits, [down * 3])
    index = [sum(min(4, 2 * min(rank, most)) for of_module in RANKS.values() for rank in of_module) for most in (3, 2)]
    np.testing.assert_array_equal(metrics.client_uplink_bits, [list(np.add(down, index)) * 3])
    for name, factors in state.adapters.modules.items():
        assert not any(map(np.any, lacks(factors, name)))


def test_layers_at_the_server_are_not_sent():
    """Oracle: counts of the outer layers and the head, and of what crosses in two steps; all layers are trained."""
    split = "training={name: split, device_layers: 1, tail_layers: 1}"
    sim = simulation(PATTERN, split, "sparsifier=dense", "control=ideal", "clients.count=2")
    state, metrics = sim.run(sim.init(jax.random.key(0)), 1)
    step = 2 * 4 * 4 * 64 * 32  # at two cuts, four examples of four positions
    sent = bits_of(sim, state, layers=(0, 3)) + 2 * step
    np.testing.assert_array_equal(metrics.client_uplink_bits, [[sent] * 2])
    assert np.any(state.adapters.modules["up"].b[2, 3])


@pytest.mark.parametrize(
    "settings",
    [
        ("sparsifier=soft", "aggregation=flexlora", "control={name: tsfa, V: 3.0, latency_budget_s: 1.0}"),
        ("sparsifier=dense", "aggregation={name: fedex, start: keep}"),
    ],
)
def test_one_rank_for_all_by_pattern_is_that_rank(settings):
    """Invariance: whatever the structural rank and alpha are that no layer has."""
    even = simulation("lora={rank: 2, alpha: 10.0}", *settings)
    named = simulation("lora={rank: 3, rank_pattern: {'.*': 2}, alpha_pattern: {'.*': 10.0}}", *settings)
    (first, expected), (second, found) = (sim.run(sim.init(jax.random.key(1)), 2) for sim in (even, named))
    np.testing.assert_array_equal(found.client_uplink_bits, expected.client_uplink_bits)
    np.testing.assert_array_equal(found.client_downlink_bits, expected.client_downlink_bits)
    for name in ("train_loss", "eval_loss", "latency_s", "kept_ranks_mean", "tail_energy", "covariance_error"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=2e-4, atol=1e-5, err_msg=name)
    for name, factors in second.adapters.modules.items():
        other = first.adapters.modules[name]
        np.testing.assert_allclose(factors.a[..., :2], other.a[..., :2], atol=1e-4)
        np.testing.assert_allclose(factors.b[:, :2], other.b[:, :2], atol=1e-4)
        assert not np.any(factors.a[..., 2:])


def test_the_rank_of_the_other_layers_is_a_number():
    """Oracle: the rank and scale of each layer, by hand, where the structural rank is swept."""
    sim = simulation(PATTERN)

    def of(rank):
        made = sim.make_parts({**sim.numbers, "lora.rank": rank})
        return made.rank, made.ranks, made.layer_ranks, made.layer_scales

    most, ranks, of_layers, scales = jax.jit(jax.vmap(of))(jnp.float32([2, 4]))
    np.testing.assert_array_equal(most, 4)
    np.testing.assert_array_equal(ranks, 4)
    np.testing.assert_array_equal(of_layers["query"], [[1, 2, 4, 2], [1, 4, 4, 4]])
    np.testing.assert_allclose(scales["query"], [[16, 8, 4, 8], [16, 4, 4, 4]])
    np.testing.assert_allclose(scales["up"], [[2.5, 2.5, 1.25, 2.5], [1.25, 1.25, 1.25, 1.25]])
    assert parts(sim).layer_scales["up"].shape == (4,)


@pytest.mark.parametrize(
    "setting", [*(f"sparsifier={name}" for name in ("soft_rotated", "svd", "top_k", "flasc")), "training=card"]
)
def test_what_has_one_rank_for_all_layers_refuses_a_pattern(setting):
    """The message names the key, what it must be, who needs it, and what it got."""
    slot, _, name = setting.partition("=")
    rest = ("sparsifier=dense",) if slot == "training" else ()
    with pytest.raises(ConfigError) as caught:
        config("lora.rank_pattern={query: 2}", setting, *rest)
    where = f"lora.rank_pattern must be absent where {slot}.name is {name}, which needs one rank for all layers"
    assert str(caught.value).startswith(f"{where}, got {{'query': 2}}") and "\n" not in str(caught.value)
    assert config("lora.alpha_pattern={query: 2}", setting, *rest).lora.alpha_pattern == {"query": 2}


def test_a_plan_refuses_a_pattern():
    """The message names the key, who needs it, and what it got."""
    own = config("lora.rank_pattern={query: 2}", "control={name: tsfa}", "sparsifier=soft")
    with pytest.raises(ConfigError, match=r"^lora\.rank_pattern must be absent, for a plan, got {'query': 2}$"):
        planner.check(own)
