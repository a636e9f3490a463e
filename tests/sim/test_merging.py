"""Runs whose server merges products into the frozen weights, and what must know of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters.lora import add_to_base, effective, merge, rank_mask
from fedjax_lora.app import runner
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, load_config
from fedjax_lora.core.exchange import Live
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.learning import Broadcast, Client
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.io import checkpoint
from fedjax_lora.sim.merged import current_base
from fedjax_lora.sim.selection import sample
from toy import broadcast, client, config, parts, simulation


@pytest.fixture(scope="module")
def run():
    """Three rounds of FedEx-LoRA."""
    sim = simulation("aggregation.name=fedex", "sparsifier.name=dense", "local.optimizer.learning_rate=0.01")
    return sim, *sim.run(sim.init(jax.random.key(3)), 3)


def test_evaluation_is_of_base_and_merged_and_adapters(run):
    """Oracle: the model on plain weights, to which both are added by hand, and no adapter."""
    sim, state, metrics = run
    model = parts(sim).model
    used = effective(state.adapters, rank_mask(3, 4), 16.0 / 3)
    layers = dict(sim.world.base["layers"])
    w = (
        np.array(layers["up"]["w"], np.float64)
        + state.merged["up"]
        + np.einsum("lir,lro->lio", used.modules["up"].a, used.modules["up"].b)
    )
    by_hand = merge(sim.world.base, Adapters(modules={"query": used.modules["query"]}, head={}), model.sites)
    group = next(name for name in layers if "query" in name)
    n_out = model.sites["query"].n_out
    q = by_hand["layers"][group]["w"].at[:, :, :n_out].add(state.merged["query"])
    base = {
        **sim.world.base,
        "layers": {**layers, "up": {**layers["up"], "w": jnp.float32(w)}, group: {**layers[group], "w": q}},
    }
    none = Adapters(modules=jax.tree.map(jnp.zeros_like, used.modules), head=used.head)
    logits = np.asarray(model.apply(base, none, sim.world.data.test), np.float64)
    label = np.asarray(sim.world.data.test["label"])
    loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(label)), label]).mean()
    np.testing.assert_allclose(metrics.eval_loss[-1], loss, rtol=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in state.merged.values()) > 1e-5
    with_adapters = np.asarray(model.apply(current_base(parts(sim), sim.world, state), used, sim.world.data.test))
    np.testing.assert_allclose(with_adapters, logits, atol=1e-4)
    assert np.abs(np.asarray(model.apply(sim.world.base, used, sim.world.data.test)) - logits).max() > 1e-3


@pytest.mark.parametrize("method", ["fedex", "flora", "flexlora"])
def test_a_round_of_clients_of_their_own_ranks_gives_the_mean_of_their_products(method):
    """Oracle: a loop over clients, each with the product of its own ranks, from a broadcast that uses them all."""
    settings = config(f"aggregation.name={method}", "sparsifier.name=dense", "clients.count=2")
    sim = build(dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, client_ranks=(1, 2))))
    state = sim.init(jax.random.key(5))
    used = rank_mask(3, 4)[:, None]
    modules = {
        name: Factors(a=f.a, b=0.05 * used * jax.random.normal(jax.random.key(1), f.b.shape))
        for name, f in state.adapters.modules.items()
    }
    state = dataclasses.replace(state, adapters=dataclasses.replace(state.adapters, modules=modules))
    after, metrics = sim.run(state, 1)

    data, keys, scale = sim.world.data, round_keys(state.key, state.round), 16.0 / 3
    given = broadcast(sim, state)
    weight = np.asarray(data.count) / np.asarray(data.count).sum()
    expected, train = dict.fromkeys(modules, 0.0), jax.jit(parts(sim).trainer.train)
    for k, rank in enumerate((1, 2)):
        trained = train(given, client(sim, state, k, keys.local)).adapters.modules
        for name, f in trained.items():
            a, b = np.float64(f.a)[..., :rank], np.float64(f.b)[:, :rank]
            expected[name] = expected[name] + weight[k] * scale * a @ b
    for name, f in after.adapters.modules.items():
        server = scale * np.float64(f.a[..., :3]) @ np.float64(f.b[:, :3]) + after.merged.get(name, 0.0)
        np.testing.assert_allclose(server, expected[name], atol=1e-5)
        np.testing.assert_array_equal(f.b[:, 3:], 0.0)
    assert metrics.covariance_error[0] < 1e-4


def test_clients_that_keep_their_factors_compute_and_count_by_their_changes():
    """Oracle: a loop over rounds and clients, each with frozen weights of its own, from which its product is taken.

    That is FedEx-LoRA's "keep" as it is meant: `W_k = W + merged - s a0 b0` under factors a0, b0 that go on.
    """
    sim = simulation("aggregation={name: fedex, start: keep}", "sparsifier.name=dense", "clients.per_round=4")
    plain = simulation("aggregation.name=fedex", "sparsifier.name=dense", "clients.per_round=4")
    model = parts(sim).model
    scale, data = 16.0 / 3, sim.world.data
    state, train = sim.init(jax.random.key(5)), jax.jit(parts(plain).trainer.train)
    own = [state.adapters.modules] * 6
    head, merged = state.adapters.head, {name: np.zeros(leaf.shape) for name, leaf in state.merged.items()}
    for number in range(3):
        keys = round_keys(state.key, state.round)
        cohort, _ = sample(sim.layout, 6, keys)
        weight = np.asarray(data.count)[cohort] / np.asarray(data.count)[cohort].sum()
        heads, change = [], dict.fromkeys(merged, 0.0)
        for p, k in zip(weight, map(int, cohort), strict=True):
            before = {name: scale * np.float64(f.a) @ np.float64(f.b) for name, f in own[k].items()}
            weights = {name: jnp.float32(merged[name] - before[name]) for name in merged}
            given = Broadcast(
                add_to_base(sim.world.base, weights, model.sites),
                data.train,
                Adapters(own[k], head),
                Live(*map(jnp.float32, Live())),
                (),
                jnp.float32(scale),
                state.round,
            )
            key = jax.random.fold_in(keys.local, k)
            methods = {"sparsifier": (), "drift": (), "aggregation": ()}
            one = Client(data.index[k], data.count[k], key, jnp.float32(3), {}, methods)
            found = train(given, one).adapters
            for name, f in found.modules.items():
                change[name] = change[name] + p * (scale * np.float64(f.a) @ np.float64(f.b) - before[name])
            heads.append(jax.tree.map(lambda leaf, p=p: p * leaf, found.head))
            own[k] = found.modules
        merged = {name: merged[name] + change[name] for name in merged}
        head = jax.tree.map(lambda *leaves: sum(leaves), *heads)
        state, metrics = sim.run(state, 1)
        for name, expected in merged.items():
            np.testing.assert_allclose(state.merged[name], expected, atol=2e-4 * np.abs(expected).max())
            for part in ("a", "b"):
                held = np.stack([np.asarray(getattr(f[name], part)) for f in own])
                np.testing.assert_allclose(
                    getattr(state.clients.methods["aggregation"][name], part), held, rtol=1e-3, atol=2e-5
                )
            assert not np.any(state.adapters.modules[name].b)
        assert metrics.covariance_error[0] < 1e-4 and metrics.sparsification_error[0] < 1e-4
        head_values, factors = 64 * 10 + 10, 4 * 3 * (64 + 64 + 64 + 256)
        values = 4 * 64 * 64 + 4 * 64 * 256 if number else factors
        seed = 1 if number else 0
        np.testing.assert_array_equal(metrics.client_downlink_bits, 32 * (values + head_values + seed))
        np.testing.assert_array_equal(metrics.client_uplink_bits, 32 * (factors + head_values))
    assert max(np.abs(leaf).max() for leaf in merged.values()) > 1e-4


def test_what_was_merged_survives_a_checkpoint(run, tmp_path):
    """Oracle: the run that was never interrupted, to the bit."""
    sim, state, _ = run
    checkpoint.save(tmp_path, state)
    restored = checkpoint.restore(next(checkpoint.whole(tmp_path)), sim.init(jax.random.key(3)))
    (further, _), (other, _) = sim.run(state, 2), sim.run(restored, 2)
    for x, y in zip(
        jax.tree.leaves((further.merged, further.adapters)),
        jax.tree.leaves((other.merged, other.adapters)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_downlink_is_charged_with_the_residual(run):
    """Oracle: FedIT's broadcast and a count by hand: 6 clients' 3 components, or the matrix in full; not in round 1."""
    _, state, metrics = run
    plain = simulation("sparsifier.name=dense")
    _, alone = plain.run(plain.init(jax.random.key(3)), 1)
    values = 0
    for f in state.adapters.modules.values():
        layers, n_in, n_out = f.a.shape[0], f.a.shape[1], f.b.shape[2]
        values += layers * min(18 * (n_in + n_out), n_in * n_out)
    extra = metrics.client_downlink_bits - alone.client_downlink_bits
    np.testing.assert_array_equal(extra, [[0] * 6, [32 * values] * 6, [32 * values] * 6])


def test_notes_name_the_memory_of_clients_and_of_the_base():
    """Oracle: sizes by hand of SCAFFOLD's states and of the merged matrices."""
    settings = config("aggregation.name=fedex", "drift.name=scaffold", "local.optimizer.name=sgd", "clients.count=60")
    sim = build(settings)
    state = sim.init(jax.random.key(0))
    per_client = sum(leaf.size for leaf in jax.tree.leaves(state.adapters)) + 1
    found = [note for note in runner._notes(settings, sim) if "MB" in note]
    merged = 4 * sum(leaf.size for leaf in state.merged.values())
    assert found == [
        f"what the clients keep takes {60 * 4 * per_client / 1e6:.2f} MB of memory",
        f"what is merged into the base takes {merged / 1e6:.2f} MB of memory",
    ]
    few = config("aggregation.name=fedit")
    assert not [note for note in runner._notes(few, build(few)) if "MB" in note]


def test_downlink_of_clients_that_sit_out_is_charged_with_whole_matrices():
    """Oracle: a count by hand of the broadcast, then of n_in x n_out values a matrix, and a seed for the factors."""
    sim = simulation("aggregation.name=flora", "sparsifier.name=dense", "clients.per_round=2", "lora.targets=[up]")
    _, metrics = sim.run(sim.init(jax.random.key(3)), 2)
    factors, head, merged = 4 * 3 * (64 + 256), 64 * 10 + 10, 4 * 64 * 256
    bits = [[32 * (factors + head)] * 2, [32 * (head + merged) + 32] * 2]
    np.testing.assert_array_equal(metrics.client_downlink_bits, bits)


@pytest.mark.parametrize("method", ["{name: flora}", "{name: fedex, start: reinit}"])
def test_factors_drawn_anew_are_sent_as_a_seed(method):
    """Oracle: a count by hand: factors and head in round 1, then head, seed, and the shorter of stack and matrix."""
    sim = simulation(f"aggregation={method}", "sparsifier.name=dense", "lora.rank=2")
    _, metrics = sim.run(sim.init(jax.random.key(3)), 3)
    head, factors, merged = 64 * 10 + 10, 0, 0
    for n_in, n_out in ((64, 64), (64, 256)):
        factors += 4 * 2 * (n_in + n_out)
        merged += 4 * min(6 * 2 * (n_in + n_out), n_in * n_out)
    later = 32 * (head + merged) + 32
    bits = [[32 * (factors + head)] * 6, [later] * 6, [later] * 6]
    np.testing.assert_array_equal(metrics.client_downlink_bits, bits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["aggregation.name=fedex", "model.compute_dtype=bfloat16"],
            "model.compute_dtype must be float32 where aggregation.name is fedex, which needs .*, got 'bfloat16'",
        ),
        (
            ["aggregation.name=flora", "model.compute_dtype=bfloat16"],
            "model.compute_dtype must be float32 where aggregation.name is flora, which needs .*, got 'bfloat16'",
        ),
        (
            ["aggregation={name: fedex, start: old}"],
            "aggregation.start must be one of average, reinit, keep, got 'old'",
        ),
        (
            ["aggregation={name: fedex, start: keep}"],
            "sparsifier.name must be dense where aggregation.start is keep, which needs .*, got 'soft'",
        ),
        (
            ["aggregation={name: fedex, start: keep}", "sparsifier.name=dense", "wire.bits=8"],
            "wire.bits must be 32 where aggregation.start is keep, which needs .*, got 8",
        ),
        (
            ["aggregation={name: fedex, start: keep}", "sparsifier.name=dense", "lora.client_ranks=[2, 4]"],
            r"lora.client_ranks must be absent where aggregation.start is keep, which needs .*, got \(2, 4\)",
        ),
        (
            ["aggregation.name=flexlora", "server.name=adam"],
            "server.name must be sgd where aggregation.name is flexlora, which needs .*, got 'adam'",
        ),
        (
            ["aggregation.name=flora", "server.learning_rate=0.5"],
            "server.learning_rate must be 1.0 where aggregation.name is flora, which needs .*, got 0.5",
        ),
        (
            ["aggregation={name: fedex, start: reinit}", "drift.name=scaffold", "local.optimizer.name=sgd"],
            "aggregation.start must be average where drift.name is scaffold, which needs .*, got 'reinit'",
        ),
        (
            ["aggregation.name=flexlora", "sparsifier.send=change", "sparsifier.error_feedback=true"],
            "aggregation.name must be .* where sparsifier.error_feedback is true, which needs .*, got 'flexlora'",
        ),
    ],
)
def test_what_does_not_go_with_a_method_is_one_line(overrides, message):
    """The message itself."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)
