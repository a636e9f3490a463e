"""The round as a whole: against plain loops, and against what must not change it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.config.assemble import build
from fedjax_lora.core import trees
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sim.round import control, draw_channel, importance, make_round, sparsify, train_locally, transmit
from fedjax_lora.sim.selection import choose_cohort
from toy import broadcast, client, config, parts, simulation

SGD = "local.optimizer={name: sgd, learning_rate: 0.1}"  # AdamW makes much of the last bits of a gradient near zero


@pytest.fixture(scope="module")
def reference():
    """A toy run of three rounds, one client at a time."""
    sim = simulation(SGD)
    return sim, *sim.run(sim.init(jax.random.key(3)), 3)


def assert_same_run(result, other, rtol=2e-4):
    """States and metrics agree within float32's reordering of sums."""
    (state, metrics), (other_state, other_metrics) = result, other
    for x, y in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(other_state.adapters), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-5)
    np.testing.assert_allclose(metrics.train_loss, other_metrics.train_loss, rtol=rtol)
    np.testing.assert_array_equal(metrics.uplink_bits, other_metrics.uplink_bits)
    np.testing.assert_allclose(metrics.latency_s, other_metrics.latency_s, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 4, 6])
def test_chunk_size_and_padded_clients_change_nothing(reference, chunk):
    _, state, metrics = reference
    other = simulation(SGD, f"engine.client_chunk={chunk}")  # 4 does not divide 6: two clients are padding
    assert_same_run((state, metrics), other.run(other.init(jax.random.key(3)), 3))


def test_a_second_device_changes_nothing(reference, tmp_path):
    _, state, metrics = reference
    script = """
import sys, jax, numpy as np
sys.path.insert(0, sys.argv[1])
from toy import simulation
assert jax.device_count() == 2
sim = simulation(sys.argv[3], "engine.client_chunk=2")
state, metrics = sim.run(sim.init(jax.random.key(3)), 3)
measured = metrics.train_loss, metrics.uplink_bits, metrics.latency_s, metrics.eval_loss, metrics.eval_accuracy
np.savez(sys.argv[2], *map(np.asarray, jax.tree.leaves((state.adapters, measured))))
"""
    out = tmp_path / "two.npz"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(out), SGD]
    subprocess.run(command, env=environment, check=True, timeout=300)
    measured = metrics.train_loss, metrics.uplink_bits, metrics.latency_s, metrics.eval_loss, metrics.eval_accuracy
    with np.load(out) as saved:
        for x, name in zip(jax.tree.leaves((state.adapters, measured)), saved.files, strict=True):
            np.testing.assert_allclose(x, saved[name], rtol=2e-4, atol=2e-5)


def test_devices_that_factorise_at_once_do_not_wait_for_each_other(tmp_path):
    """With LAPACK called on whole stacks, this very run never ended: the oracle is the clock."""
    small = ["rounds=3", "pretrain.steps=2", "local.steps=1", "clients.count=20"]
    options = [word for setting in small for word in ("--set", setting)]
    command = [sys.executable, "-m", "fedjax_lora.app.cli", "run", "--out", str(tmp_path / "run"), *options]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 3 and summary["total_uplink_bits"] > 0


def test_a_round_of_dense_fedit_equals_a_python_loop_over_clients():
    sim = simulation("sparsifier.name=dense", "local.steps=1", "local.optimizer.name=sgd")
    state = sim.init(jax.random.key(5))
    after, metrics = sim.run(state, 1)

    data, keys = sim.world.data, round_keys(state.key, state.round)
    weight = np.asarray(data.count) / np.asarray(data.count).sum()
    average, losses, train = None, [], jax.jit(parts(sim).trainer.train)
    for number in range(6):
        trained = train(broadcast(sim, state), client(sim, state, number, keys.local))
        losses.append(float(trained.loss))
        share = jax.tree.map(lambda x, w=weight[number]: w * np.asarray(x, np.float64), trained.adapters)
        average = share if average is None else jax.tree.map(np.add, average, share)
    for x, y in zip(jax.tree.leaves(after.adapters), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.train_loss[0], np.mean(losses), rtol=1e-5)


def test_rounds_one_at_a_time_equal_a_run(reference):
    sim, state, metrics = reference
    one = sim.init(jax.random.key(3))
    rows = []
    for _ in range(3):
        one, row = sim.run(one, 1)
        rows.append(row)
    for x, y in zip(jax.tree.leaves(one.adapters), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(np.concatenate([row.train_loss for row in rows]), metrics.train_loss)


def test_a_run_shows_its_progress_where_that_is_asked_for(reference, capsys):
    """The run is the same; a silent one prints nothing."""
    sim, state, metrics = reference
    start = sim.init(jax.random.key(3))
    sim.run(start, 1)
    assert capsys.readouterr().out == ""
    assert_same_run((state, metrics), sim.run(start, 3, progress=True), rtol=0)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["round 3/3"]


def test_run_leaves_the_given_state_valid(reference):
    sim, _, _ = reference
    state = sim.init(jax.random.key(4))
    first, _ = sim.run(state, 1)
    second, _ = sim.run(state, 1)
    for x, y in zip(jax.tree.leaves(first.adapters), jax.tree.leaves(second.adapters), strict=True):
        np.testing.assert_array_equal(x, y)


def test_evaluation_equals_a_numpy_loop_over_the_test_pool(reference):
    sim, state, metrics = reference
    from fedjax_lora.adapters.lora import effective, rank_mask

    model = parts(sim).model
    used = effective(state.adapters, rank_mask(3, 4), 16.0 / 3)
    logits = np.asarray(model.apply(sim.world.base, used, sim.world.data.test), np.float64)
    label = np.asarray(sim.world.data.test["label"])
    log_z = np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(metrics.eval_loss[-1], (log_z - logits[np.arange(len(label)), label]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.eval_accuracy[-1], (logits.argmax(1) == label).mean(), rtol=1e-6)
    assert np.isnan(metrics.eval_loss[:2]).all()


def test_masked_ranks_stay_as_they_were(reference):
    sim, state, _ = reference
    start = sim.init(jax.random.key(3))
    for name, factors in state.adapters.modules.items():
        np.testing.assert_array_equal(factors.a[:, :, 3:], start.adapters.modules[name].a[:, :, 3:])
        np.testing.assert_array_equal(factors.b[:, 3:], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_base_weight_has_a_client_axis_in_the_lowered_program(dtype):
    """Shapes in the lowered text: no frozen leaf, stacked over layers or not, gains an axis of 3 or 6 clients."""
    sizes = "local.batch_size=5", "lora.max_rank=5"  # neither is a dimension of a frozen leaf
    sim = simulation("engine.client_chunk=3", *sizes, f"model.compute_dtype={dtype}")
    state = sim.init(jax.random.key(0))
    text = jax.jit(make_round(sim.make_parts)).lower(sim.world, state).as_text()
    shapes = {leaf.shape for leaf in jax.tree.leaves(sim.world.base) if leaf.ndim > 1}
    weights = shapes | {shape[1:] for shape in shapes if len(shape) == 3}
    found = {tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x(?:f|bf|ui)\d+>", text)}
    assert shapes <= found  # the text does name the frozen weights
    assert not found & {(clients, *shape) for clients in (3, 6) for shape in weights}


def test_a_diverged_client_is_counted_and_poisons_nothing():
    sim = simulation(SGD)
    state = sim.init(jax.random.key(7))
    poisoned = sim.world.data.train["image"].at[sim.world.data.index[2, : sim.world.data.count[2]]].set(jnp.nan)
    data = dataclasses.replace(sim.world.data, train={**sim.world.data.train, "image": poisoned})
    sim.world = dataclasses.replace(sim.world, data=data)
    after, metrics = sim.run(state, 2)
    assert metrics.nonfinite_clients.tolist() == [1, 1]
    assert metrics.participants.tolist() == [5, 5]
    assert bool(trees.fits_float32(after.adapters))
    assert np.isfinite(metrics.train_loss).all()
    assert (metrics.client_uplink_bits[:, 2] == 0).all()
    count = np.asarray(data.count)
    np.testing.assert_allclose(metrics.absent_weight, count[2] / count.sum(), rtol=1e-6)  # by hand
    # Oracle: the same round in which that client has no data at all has the same average.
    absent = dataclasses.replace(sim.world.data, train={**data.train, "image": jnp.nan_to_num(poisoned)})
    loop = _average_without(sim, dataclasses.replace(sim.world, data=absent), state, 2)
    first, _ = sim.run(state, 1)
    for x, y in zip(jax.tree.leaves(first.adapters.head), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparsifier", ["dense", "soft", "soft_rotated", "svd"])
def test_a_finite_update_whose_energies_are_not_is_left_out_too(sparsifier):
    """Invariance: where all clients diverge so far, without a single NaN of their own, the server's adapters stay."""
    sim = simulation(
        "local={steps: 1, optimizer: {name: sgd, learning_rate: 1e21}}", f"sparsifier={{name: {sparsifier}}}"
    )
    state = sim.init(jax.random.key(0))
    after, metrics = sim.run(state, 2)
    assert (metrics.nonfinite_clients.tolist(), metrics.participants.tolist()) == ([6, 6], [0, 0])
    for x, y in zip(jax.tree.leaves(after.adapters), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(metrics.latency_s).all()


def _average_without(sim, world, state, left_out):
    """NumPy average of the heads of all clients but one."""
    keys, data = round_keys(state.key, state.round), world.data
    clients = [number for number in range(6) if number != left_out]
    weight = np.asarray(data.count)[clients] / np.asarray(data.count)[clients].sum()
    heads, train = [], jax.jit(parts(sim).trainer.train)
    for number in clients:
        trained = train(broadcast(sim, state, world), client(sim, state, number, keys.local))
        heads.append(trained.adapters.head)
    return jax.tree.map(lambda *h: sum(w * np.asarray(x) for w, x in zip(weight, h, strict=True)), *heads)


def test_partial_participation_counts_and_charges_only_the_cohort():
    sim = simulation("clients.per_round=2", "clients.weighting=equal")
    _, metrics = sim.run(sim.init(jax.random.key(1)), 4)
    assert metrics.participants.tolist() == [2] * 4
    np.testing.assert_allclose(metrics.absent_weight, 4 / 6, rtol=1e-6)  # by hand: 4 of 6 are absent
    assert metrics.client_uplink_bits.shape == (4, 2)
    full = simulation()
    _, whole = full.run(full.init(jax.random.key(1)), 1)
    assert (metrics.uplink_bits * 3 == whole.uplink_bits).all()
    assert whole.absent_weight.tolist() == [0.0]


def test_accounting_of_latency_and_keep_ratio_by_hand(reference):
    _, state, metrics = reference
    np.testing.assert_allclose(metrics.elapsed_s, np.cumsum(metrics.latency_s), rtol=1e-6)
    np.testing.assert_allclose(state.elapsed_s, metrics.elapsed_s[-1])
    np.testing.assert_allclose(metrics.kept_ranks_mean, 2.0)  # floor(0.7 * 3)
    width = {"query": 64 + 64, "up": 64 + 256}
    index = min(4, 2 * 2)
    bits = sum(4 * (2 * w * 32 + index) for w in width.values()) + (64 * 10 + 10) * 32
    np.testing.assert_array_equal(metrics.client_uplink_bits, bits)
    dense = sum(4 * 3 * w * 32 for w in width.values()) + (64 * 10 + 10) * 32
    np.testing.assert_array_equal(metrics.client_downlink_bits, dense)


def test_energies_of_a_round_equal_numpy_over_who_was_heard():
    """Oracle: norms and products of the cohort's own factors, client by client, of those whose upload arrived."""
    sim = simulation("wireless.csi=mean", "wireless.fade_margin_db=0.0")
    state = sim.init(jax.random.key(3))
    _, metrics = sim.run(state, 1)
    made = parts(sim)

    @jax.jit
    def steps(world, state):
        keys = round_keys(state.key, state.round)
        state = draw_channel(made, state, keys.channel)
        cohort = choose_cohort(made, world, state, keys)
        local = train_locally(made, world, state, cohort)
        decision = control(made, cohort, local, importance(made, cohort, local))
        upload = sparsify(made, cohort, local, decision.kept, keys.sparsify)
        return local.shown.modules, transmit(made, cohort, local, decision, upload).arrived

    shown, arrived = steps(sim.world, state)
    assert 0 < arrived.sum() < 6
    profile, dropped = np.zeros(5), 0.0
    for k in np.flatnonzero(arrived):
        for f in shown.values():
            for a, b in zip(np.float64(f.a[k])[..., :3], np.float64(f.b[k])[:, :3], strict=True):
                energy = np.sum(a**2, 0) * np.sum(b**2, 1)
                order = np.argsort(-energy)
                profile[:3] += [energy[order[kept:]].sum() for kept in range(3)]
                out = order[2:]  # floor(0.7 * 3) are sent
                dropped += np.sum((a[:, out] @ b[out]) ** 2)
    np.testing.assert_allclose(metrics.tail_energy[0], profile / arrived.sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics.dropped_energy[0], dropped / arrived.sum(), rtol=1e-4)


def test_one_program_serves_every_number_of_rounds(reference):
    sim, _, _ = reference
    compiled = sim._compiled
    sim.run(sim.init(jax.random.key(9)), 5)
    assert sim._compiled is compiled


def test_the_queues_of_a_run_are_the_sums_of_what_its_rounds_took():
    """Oracle: both laws in float64 over the log; with lost uploads that are sent again, which take time and energy."""
    sim = simulation(
        "control={name: tsfa, latency_budget_s: 1.0, queue_s: 0.5, energy_budget_j: 0.01}",
        "wireless={csi: mean, fade_margin_db: 3.0, retransmissions: 2}",
    )
    state, metrics = sim.run(sim.init(jax.random.key(3)), 4)
    latency, energy = 0.5, 0.0
    for spent_s, spent_j, found_s, found_j in zip(
        metrics.latency_s, metrics.energy_j / 6, metrics.queue_s, metrics.energy_queue_j, strict=True
    ):
        latency, energy = max(latency + spent_s - 1.0, 0.0), max(energy + spent_j - 0.01, 0.0)
        np.testing.assert_allclose([found_s, found_j], [latency, energy], rtol=1e-5)
    queues = state.methods["control"]
    assert queues["queue_s"] > 0 and queues["energy_queue_j"] > 0


def test_rounds_below_one_are_refused(reference):
    sim, state, _ = reference
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        sim.run(state, 0)


def test_the_network_can_be_taken_away_without_changing_what_is_learned():
    fixed, ideal = simulation("clients.per_round=3"), build(config("clients.per_round=3", "control.name=ideal"))
    fixed_state, fixed_metrics = fixed.run(fixed.init(jax.random.key(2)), 2)
    ideal_state, ideal_metrics = ideal.run(ideal.init(jax.random.key(2)), 2)
    assert fixed_metrics.participants.tolist() == ideal_metrics.participants.tolist() == [3, 3]
    for x, y in zip(jax.tree.leaves(fixed_state.adapters), jax.tree.leaves(ideal_state.adapters), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert (ideal_metrics.latency_s < fixed_metrics.latency_s).all()


def test_factors_have_no_square_shape_in_this_toy():
    """The toy must not hide a transpose: one of its modules is not square."""
    sim = simulation()
    factors: Factors = sim.init(jax.random.key(0)).adapters.modules["up"]
    adapters: Adapters = sim.init(jax.random.key(0)).adapters
    assert factors.a.shape[1] != factors.b.shape[2]
    assert set(adapters.head) == {"w", "b"}
