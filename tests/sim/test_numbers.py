"""Every traced number of an experiment, under vmap, in whole runs. Oracle: the same settings one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.numbers import split, traced_keys
from fedjax_lora.sim.engine import make_segment
from toy import config, simulation

SETTINGS = {
    "soft, tsfa, estimated channels": (
        "control={name: tsfa, V: 3.0, latency_budget_s: 1.0, energy_budget_j: 0.05, max_keep_ratio: 0.9}",
        "wireless={fading: rician, csi: estimated, retransmissions: 1, downlink: true, path_loss: umi}",
        "local.optimizer={name: adamw, schedule: cosine, warmup_steps: 2, weight_decay: 0.1, clip_norm: 1.0}",
    ),
    "hetlora of ranks, fedprox, yogi, greedy": (
        "sparsifier={name: soft, missing: zero}",
        "aggregation={name: hetlora, prune: 0.9}",
        "lora.client_ranks=[1, 2, 3]",
        "drift.name=fedprox",
        "server.name=yogi",
        "control={name: greedy}",
        "local.optimizer={name: momentum, momentum: 0.8}",
    ),
    "top_k, lora_fair, momentum, proportional": (
        "sparsifier={name: top_k}",
        "aggregation.name=lora_fair",
        "server={name: momentum}",
        "control={name: proportional}",
        "local.optimizer.name=sgd",
    ),
    "flasc, adam, fixed": ("sparsifier={name: flasc}", "server.name=adam", "wireless.path_loss=uma"),
}
FACTORS = 1.0, 0.96, 0.92


def varied(numbers, by):
    """All numbers at once; a 0 becomes a little more, and a rank stays whole."""
    moved = {key: np.where(value == 0, 1.0 - by, value * by) for key, value in numbers.items()}
    moved["lora.rank"] = numbers["lora.rank"] - (by < 0.95)
    if "lora.client_ranks" in numbers:
        moved["lora.client_ranks"] = np.minimum(numbers["lora.client_ranks"], moved["lora.rank"])
    return {key: jnp.asarray(value, jnp.float32) for key, value in moved.items()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_three_values_of_every_number_equal_three_single_runs(settings):
    """Participants and bits to the last, losses and latencies in float32."""
    sim = simulation(*settings)
    segment = make_segment(sim.make_parts, 64, 2)

    def run(numbers):
        state = sim.program.init(jax.random.key(3), numbers)
        _, metrics, scores = segment(sim.world, state, jnp.int32(2))
        return metrics, scores.loss

    each = [varied(sim.numbers, by) for by in FACTORS]
    batch, losses = jax.jit(jax.vmap(run))({key: jnp.stack([one[key] for one in each]) for key in each[0]})
    alone = jax.jit(run)
    single = [alone(one) for one in each]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *(metrics for metrics, _ in single))
    for name in ("participants", "outages", "uplink_bits", "downlink_bits"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))
    for name in ("train_loss", "latency_s", "energy_j", "queue_s", "kept_ranks_mean"):
        np.testing.assert_allclose(getattr(batch, name), getattr(expected, name), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(losses, [loss for _, loss in single], rtol=2e-3)
    assert len({float(x) for x in np.asarray(batch.latency_s)[:, 0]}) == 3  # the values make a difference


def used(settings):
    """The traced numbers of a configuration, and those that its program uses."""
    sim = simulation(*settings)
    segment = make_segment(sim.make_parts, 64, 2)

    def run(numbers):
        return segment(sim.world, sim.program.init(jax.random.key(3), numbers), jnp.int32(2))[1:]

    jaxpr = jax.make_jaxpr(run)(sim.numbers).jaxpr
    names = [key for key, _ in sorted(sim.numbers.items())]
    taken = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    return set(names), {name for name, variable in zip(names, jaxpr.invars, strict=True) if id(variable) in taken}


def test_no_traced_number_is_left_unused():
    """Structure: each is an operand of the program in one of the settings at least."""
    found = [used(settings) for settings in SETTINGS.values()]
    assert set().union(*(every for every, _ in found)) == set().union(*(taken for _, taken in found))


def test_a_structure_holds_no_number_and_is_one_for_all_of_them():
    """Invariance: configurations that differ in traced numbers alone have one structure."""
    first, second = (config(f"control.keep_ratio={ratio}", f"wireless.power_dbm={ratio}") for ratio in (0.3, 0.4))
    assert split(first)[0] == split(second)[0] and hash(split(first)[0]) == hash(split(second)[0])
    assert set(split(first)[1]) == set(traced_keys(first))
    assert split(config("wireless.fading=none"))[0] != split(first)[0]
