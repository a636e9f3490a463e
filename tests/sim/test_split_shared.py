"""One server copy for all devices, devices one after another, and kept activations: against loops in plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_lora.config.experiment import ConfigError
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.types import Adapters
from fedjax_lora.sim.round import draw_channel, make_round
from fedjax_lora.training.local import drawn_batches
from toy import clients, config, parts, simulation

IDEAL = ("control.name=ideal", "control.keep_ratio=1.0", "sparsifier=dense", "rounds=2", "engine.eval_every=2")
EXACT = {"rtol": 0, "atol": 1e-5}


def assert_near(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected)


def test_a_shared_copy_of_one_device_is_its_own():
    """Oracle: a copy for each device, averaged, where one device takes part in a round."""
    ends = []
    for kind in ("averaged", "shared"):
        sim = simulation(*IDEAL, f"training={{name: split, server_adapters: {kind}}}", "clients.per_round=1")
        ends.append(sim.run(sim.init(jax.random.key(3)), 2)[0].adapters)
    assert_near(*ends)


def batches(sim, state):
    """`[C, E, B]` rows and weights of the batches of the next round, in which all take part."""
    ids = jnp.arange(6)
    own = clients(sim, state, ids, client_keys(round_keys(state.key, state.round).local, ids))
    local = config().local
    return jax.vmap(lambda one: drawn_batches(jax.random.split(one.key)[0], one, local))(own)


def order_of(kind):
    """`(device, step)` of a round of six devices and two steps."""
    if kind == "sequential":
        return [(device, step) for device in range(6) for step in range(2)]
    return [(device, step) for step in range(2) for device in range(6)]


def loss_of(sim):
    """`(adapters, rows, weight) -> loss` of the whole model, and its gradient."""
    made = parts(sim)

    def loss(adapters, rows, weight):
        batch = {name: leaf[rows] for name, leaf in sim.world.data.train.items()}
        mask = jnp.arange(4) < 3
        modules = made.adapter.effective(adapters.modules, mask.astype(jnp.float32), made.scale)
        outputs = made.model.apply(sim.world.base, Adapters(modules, adapters.head), batch, None)
        return made.task.loss(outputs, batch, weight)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_devices_step_one_copy_in_their_order(kind):
    """Oracle: a Python loop of plain SGD over those who are heard, the heads their own, and the mean of these.

    Two places of the cohort are padding, and who fades is let go.
    """
    sim = simulation(
        *IDEAL,
        f"training={{name: split, server_adapters: shared, order: {kind}}}",
        "local.optimizer={name: sgd, learning_rate: 0.1}",
        "wireless.fade_threshold=0.5",
        "engine.client_chunk=4",
        "control={name: uniform, keep_ratio: 1}",
    )
    state = sim.init(jax.random.key(4))
    rows, weight = batches(sim, state)
    faded = draw_channel(parts(sim), state, round_keys(state.key, state.round).channel).methods["wireless"].fading
    heard = np.abs(np.asarray(faded)) ** 2 >= 0.5
    assert 0 < heard.sum() < 6
    gradient, server, heads = loss_of(sim), state.adapters.modules, [state.adapters.head] * 6
    for device, step in order_of(kind):
        if not heard[device]:
            continue
        found = gradient(Adapters(server, heads[device]), rows[device, step], weight[device, step])
        server = jax.tree.map(lambda x, g: x - 0.1 * g, server, found[1].modules)
        heads[device] = jax.tree.map(lambda x, g: x - 0.1 * g, heads[device], found[1].head)
    share = heard * np.asarray(sim.world.data.count) / np.sum(heard * sim.world.data.count)
    head = jax.tree.map(lambda *each: sum(p * x for p, x in zip(share, each, strict=True)), *heads)
    after, metrics = sim.run(state, 1)
    assert_near(after.adapters, Adapters(server, head))
    assert metrics.participants[0] == heard.sum()


def test_who_diverges_takes_nobody_else_along():
    """By construction: one client's only example is no number; the shared copy stays finite and moves."""
    sim = simulation(*IDEAL, "training={name: split, server_adapters: shared}")
    state = sim.init(jax.random.key(4))
    data = sim.world.data
    image = data.train["image"].at[data.index[2]].set(jnp.nan)
    world = dataclasses.replace(sim.world, data=dataclasses.replace(data, train={**data.train, "image": image}))
    after, metrics = jax.jit(make_round(sim.make_parts))(world, state)
    assert int(metrics.nonfinite_clients) == 1 and int(metrics.participants) == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.adapters))
    assert np.abs(np.asarray(after.adapters.modules["query"].b)).max() > 0


@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_split_frozen_is_central_training_of_the_upper_layers(alpha):
    """Oracle: optax's AdamW over the batches in the same order, of upper layers and head alone, whoever holds them."""
    sim = simulation(
        *IDEAL,
        "training={name: split, device_layers: 2, device_adapters: frozen, task: server, server_adapters: shared}",
        "training.order=sequential",
        "local.optimizer={name: adamw, learning_rate: 0.01}",
        f"clients.partition.alpha={alpha}",
    )
    state = sim.init(jax.random.key(5))
    rows, weight = batches(sim, state)
    gradient, adapters = loss_of(sim), state.adapters
    upper = Adapters(jax.tree.map(lambda x: x[2:], adapters.modules), adapters.head)
    optimizer = optax.adamw(0.01, weight_decay=0.0)
    moments = optimizer.init(upper)

    def whole(upper):
        lower = jax.tree.map(lambda x: x[:2], state.adapters.modules)
        return Adapters(jax.tree.map(lambda x, y: jnp.concatenate([x, y]), lower, upper.modules), upper.head)

    for device, step in order_of("sequential"):
        _, found = gradient(whole(upper), rows[device, step], weight[device, step])
        found = Adapters(jax.tree.map(lambda x: x[2:], found.modules), found.head)
        updates, moments = optimizer.update(found, moments, upper)
        upper = optax.apply_updates(upper, updates)
    after, _ = sim.run(state, 1)
    assert_near(after.adapters, whole(upper))


FROZEN_AT_SERVER = (
    "training={name: split, device_layers: 2, device_adapters: frozen, task: server}",
    "sparsifier=dense",
    "control={name: uniform, keep_ratio: 1}",
    "wireless={server_hz: 1e9, bandwidth_hz: 1e6}",
)
FROZEN = "training={name: split, device_layers: 2, device_adapters: frozen, task: server}"


def test_kept_activations_change_nothing_but_the_bits():
    """Oracle: the same run without; and a set of the examples that were heard, by hand: a value is 32 bits."""
    runs, over_the_air = [], ("sparsifier=dense", "control={name: uniform, keep_ratio: 1}", "wireless.csi=mean")
    for kept in ("false", "true"):
        own = *over_the_air, FROZEN, f"training.cache_activations={kept}", "wireless.fade_margin_db=2"
        sim = simulation(*own, "clients.partition.kind=iid", "rounds=4", "engine.eval_every=1")
        state = sim.init(jax.random.key(6))
        drawn, held, bits = [], set(), []
        for _ in range(4):
            drawn.append(jax.tree.map(np.asarray, batches(sim, state)))
            state, metrics = sim.run(state, 1)
            heard = np.abs(np.asarray(state.methods["wireless"].fading)) ** 2 >= 10**-0.2  # else the upload fails
            assert metrics.participants[0] == heard.sum()
            bits.append((metrics.client_uplink_bits[0], heard))
        runs.append((state, bits))
    (without, every), (with_, bits) = runs
    jax.tree.map(np.testing.assert_array_equal, without.adapters, with_.adapters)
    for (rows, weight), (own, heard), (all_, _) in zip(drawn, bits, every, strict=True):
        for device in range(6):
            sent = rows[device][weight[device] > 0]
            new = set(sent.tolist()) - held
            held |= new if heard[device] else set()
            example = 4 * 64 * 32  # positions, features, bits
            assert all_[device] == sent.size * (example + 32)
            assert own[device] == len(new) * example + sent.size * 32
    np.testing.assert_array_equal(np.flatnonzero(with_.methods["training"]), sorted(held))


def test_devices_in_turn_take_as_long_as_all_of_them_together():
    """By hand: each has the whole band, the server and the downlink for itself."""
    own = ("training={name: split, order: sequential}", "sparsifier=dense", "control={name: fixed, keep_ratio: 1}")
    sim = simulation(*own, "rounds=1", "engine.eval_every=1")
    state = sim.init(jax.random.key(7))
    after, metrics = sim.run(state, 1)
    cell, network = after.methods["wireless"], config(*own).wireless
    snr_hz = np.float64(cell.mean_gain) * np.abs(np.asarray(cell.fading, np.complex128)) ** 2
    snr_hz *= 1e-3 * 10 ** (network.power_dbm / 10) / (1e-3 * 10 ** (-17.4))
    up_s = metrics.client_uplink_bits[0] / (network.bandwidth_hz * np.log2(1 + snr_hz / network.bandwidth_hz))
    crossing = 2 * 4 * 4 * 64 * 32  # steps, examples, positions, features, bits: down at the second cut
    gain = 10 ** ((network.downlink_power_dbm - network.power_dbm) / 10)
    down_s = crossing / (network.downlink_hz * np.log2(1 + gain * snr_hz / network.downlink_hz))
    server_s = 2 * 4 * network.cycles_per_sample / network.server_hz
    np.testing.assert_allclose(metrics.latency_s[0], np.sum(up_s + down_s + server_s), rtol=1e-4)


def test_steps_that_overlap_go_on_at_the_pace_of_the_slowest():
    """Oracle: a table of when each stage of each step of each device begins and ends."""
    own = (*FROZEN_AT_SERVER, "local.steps=5", "clients.partition.kind=iid", "rounds=1", "engine.eval_every=1")
    sims = [simulation(*own, f"training.pipelined={asked}") for asked in ("false", "true")]
    (state, plain), (_, found) = (sim.run(sim.init(jax.random.key(9)), 1) for sim in sims)
    cell, network = state.methods["wireless"], config(*own).wireless
    cycles = 5 * 4 * network.cycles_per_sample
    device_s, server_s = 0.25 * cycles / np.float64(cell.cpu_hz), 6 * 0.5 * cycles / network.server_hz
    snr_hz = np.float64(cell.mean_gain) * np.abs(np.asarray(cell.fading, np.complex128)) ** 2
    snr_hz *= 1e-3 * 10 ** (network.power_dbm / 10) / (1e-3 * 10 ** (-17.4))
    band_hz = network.bandwidth_hz / 6
    up_s = plain.client_uplink_bits[0] / (band_hz * np.log2(1 + snr_hz / band_hz))
    np.testing.assert_allclose(plain.latency_s[0], np.max(device_s + up_s + server_s), rtol=1e-4)
    ends = []
    for stages in zip(device_s / 5, up_s / 5, np.full(6, server_s / 5), strict=True):
        free = [0.0, 0.0, 0.0]
        for _ in range(5):
            ready = 0.0
            for place, stage_s in enumerate(stages):
                ready = free[place] = max(ready, free[place]) + stage_s
        ends.append(free[-1])
    np.testing.assert_allclose(found.latency_s[0], max(ends), rtol=1e-4)
    assert found.latency_s[0] < plain.latency_s[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training={name: split, device_layers: 1, cache_activations: true}"],
            "device_adapters must be frozen where cache_activations is true, got 'trained'",
        ),
        (
            ["training={name: split, cache_activations: true, exchange: int8}"],
            "exchange must be float32 or bfloat16 where cache_activations is true",
        ),
        (
            ["training={name: split, pipelined: true}"],
            "task must be server where pipelined is true, got 'device'",
        ),
        (
            ["training={name: split, cache_activations: true}", "model.dropout=0.1"],
            "model.dropout must be 0 where training.cache_activations is true, which needs no dropout, got 0.1",
        ),
        (
            ["training={name: split, server_adapters: shared}", "drift=scaffold", "local.optimizer.name=sgd"],
            "training.server_adapters must be averaged where drift.name is scaffold, "
            "which needs clients that train apart from one another, got 'shared'",
        ),
        (
            ["training={name: split, order: sequential}", "control={name: tsfa}"],
            "training.order must be parallel where control.name is tsfa, "
            "which needs clients that send side by side, got 'sequential'",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        simulation("sparsifier=dense", *overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
