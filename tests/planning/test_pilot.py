"""What a pilot measures, against finite differences, a NumPy loop over clients and the identity of the two errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters.lora import rank_mask
from fedjax_lora.aggregation import fedex, fedit, flexlora, flora, hetlora, lora_fair
from fedjax_lora.aggregation.products import by_products
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.methods import Context
from fedjax_lora.data.batches import hold_out
from fedjax_lora.planning import pilot
from fedjax_lora.sim.round import sparsify, train_locally
from fedjax_lora.sim.scores import score
from fedjax_lora.sim.selection import choose_cohort, normalised
from toy import simulation

AT_THREE = jnp.float32(3), jnp.float32(16 / 3)
"""Rank and scale."""


def started(*overrides):
    """A simulation, a state with b not 0, as after a few rounds, and a sample."""
    sim = simulation(*overrides)
    state = sim.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(2), len(state.adapters.modules))
    modules = {
        name: dataclasses.replace(f, b=0.1 * rank_mask(3, 4)[:, None] * jax.random.normal(key, f.b.shape))
        for key, (name, f) in zip(keys, state.adapters.modules.items(), strict=True)
    }
    state = dataclasses.replace(state, adapters=dataclasses.replace(state.adapters, modules=modules))
    return sim, state, pilot.sample_of(sim.world, sim.make_parts(sim.numbers), jax.random.key(1))


@pytest.fixture(scope="module")
def toy():
    return started()


@pytest.fixture(scope="module")
def measured(toy):
    """Pilots of one round at ranks 1 and 3."""
    sim, state, sample = toy
    run = jax.jit(pilot.make_pilot(sim.make_parts, sim.full_gradient, jnp.ones(2)))
    return {rank: jax.device_get(run(sim.world, sample, state, jnp.float32(rank))) for rank in (1, 3)}


@pytest.fixture(scope="module")
def trained(toy):
    """The cohort of the state's next round at rank 3, trained, its weights, and what it uploads of two ranks."""
    sim, state, _ = toy

    def train(world, state):
        parts, keys = sim.make_parts(state.numbers), round_keys(state.key, state.round)
        cohort = choose_cohort(parts, world, state, keys)
        local = train_locally(parts, world, state, cohort)
        upload = sparsify(parts, cohort, local, jnp.full(local.active.shape, 2.0), keys.sparsify)
        return cohort, local, normalised(local.weight * local.active), upload

    return jax.jit(train)(sim.world, pilot.at_rank(state, jnp.float32(3)))


def test_the_gradient_is_by_the_weights_themselves(toy):
    """Oracle: central differences of the loss along the gradient of one module, by moving the frozen weights."""
    sim, state, sample = toy
    loss = jax.jit(sim.full_gradient)
    value, gradient = loss(sim.world.base, sample, state.adapters, *AT_THREE)
    pool = dataclasses.replace(sim.world, data=dataclasses.replace(sim.world.data, test=sample))
    scored = jax.jit(lambda world, state: score(sim.make_parts(state.numbers), world, state, 64))(pool, state)
    np.testing.assert_allclose(value, scored.loss, rtol=1e-5)
    along = gradient.modules["up"] / jnp.linalg.norm(gradient.modules["up"])

    def moved(step):
        layers = sim.world.base["layers"]
        up = {**layers["up"], "w": layers["up"]["w"] + step * along}
        base = {**sim.world.base, "layers": {**layers, "up": up}}
        return float(loss(base, sample, state.adapters, *AT_THREE)[0])

    slope = (moved(0.05) - moved(-0.05)) / 0.1
    np.testing.assert_allclose(jnp.vdot(gradient.modules["up"], along), slope, rtol=0.02)


def test_the_ideal_movement_is_the_average_of_the_clients_products(toy, trained):
    """Oracle: NumPy, one client after the other, in float64."""
    state = toy[1]
    cohort, local, weights, _ = trained
    mask, scale = np.asarray(rank_mask(3, 4)), 16 / 3
    everything = {name: jnp.ones((4, 4)) for name in state.adapters.modules}
    found = pilot._mean_movement(by_products, cohort.start, local.shown, everything, weights, jnp.asarray(mask), scale)
    for name, old in state.adapters.modules.items():
        new = local.trained.adapters.modules[name]
        before = (np.float64(old.a) * mask) @ np.float64(old.b)
        after = [(np.float64(a) * mask) @ np.float64(b) for a, b in zip(new.a, new.b, strict=True)]
        expected = scale * (np.einsum("c,clio->lio", np.float64(weights), np.array(after)) - before)
        np.testing.assert_allclose(found.modules[name], expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def two_rounds(toy):
    """Two measured rounds at rank 3: the state after each, and what it shows."""
    sim, state, sample = toy
    measure = jax.jit(lambda s: pilot._measure(sim.make_parts(s.numbers), sim.full_gradient, sim.world, sample, s))
    first = measure(pilot.at_rank(state, jnp.float32(3)))
    return jax.device_get((first, measure(first[0])))


@pytest.fixture(scope="module")
def round_at_three(two_rounds):
    """The first of them."""
    return two_rounds[0]


def test_weights_in_bfloat16_are_differentiated_in_float32(toy):
    """Oracle: the float32 model at the same weights."""
    sim, state, sample = toy
    half = simulation("model.compute_dtype=bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.float32), half.world.base)
    assert {jnp.dtype(jnp.bfloat16)} < {leaf.dtype for leaf in jax.tree.leaves(half.world.base)}
    found = jax.jit(half.full_gradient)(half.world.base, sample, state.adapters, *AT_THREE)
    expected = jax.jit(sim.full_gradient)(base, sample, state.adapters, *AT_THREE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)
    run = jax.jit(pilot.make_pilot(half.make_parts, half.full_gradient, jnp.ones(2)))
    measured = run(half.world, sample, half.init(jax.random.key(0)), jnp.float32(3)).measured
    assert np.isfinite(np.concatenate([np.ravel(x) for x in measured])).all() and measured.share > 0


def range_of(x):
    """The projector on the range of a matrix, by SVD."""
    u, size, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, size > 1e-9 * size[0]]
    return u @ u.T


def test_what_a_round_shows_is_products_of_gradient_and_movement(toy, trained, round_at_three):
    """Oracle: NumPy in float64, projectors by SVD, and the movements of the tests above."""
    sim, state, sample = toy
    (after, step), start = round_at_three, pilot.at_rank(state, jnp.float32(3))
    loss, gradient = jax.jit(sim.full_gradient)(sim.world.base, sample, start.adapters, *AT_THREE)
    cohort, local, weights, _ = trained
    everything = {name: jnp.ones((*f.a.shape[:2], 4)) for name, f in local.shown.modules.items()}
    mask, scale = rank_mask(3, 4), jnp.float32(16 / 3)
    ideal = pilot._mean_movement(by_products, cohort.start, local.shown, everything, weights, mask, scale)
    moved = pilot._movement(state.adapters, after.adapters, {}, mask, scale)
    g, d, m = ([np.float64(leaf) for leaf in jax.tree.leaves(tree)] for tree in (gradient, ideal, moved))

    def dot(x, y):
        return sum(np.sum(one * other) for one, other in zip(x, y, strict=True))

    followed = sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient.head))
    for name, matrices in gradient.modules.items():
        f = state.adapters.modules[name]
        for layer, matrix in enumerate(np.float64(matrices)):
            left, right = range_of(np.float64(f.a[layer, :, :3])), range_of(np.float64(f.b[layer, :3]).T)
            rest = matrix - left @ matrix
            followed += np.sum((left @ matrix) ** 2) + np.sum((rest @ right) ** 2)
    np.testing.assert_allclose(step.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(step.gradient_sq, dot(g, g), rtol=1e-4)
    np.testing.assert_allclose(step.followed_sq, followed, rtol=1e-3)
    assert step.followed_sq < 0.99 * step.gradient_sq
    np.testing.assert_allclose(step.progress, -dot(g, d), rtol=1e-3)
    np.testing.assert_allclose(step.movement, dot(d, d), rtol=1e-3)
    np.testing.assert_allclose(step.slope, dot(g, m), rtol=1e-3)
    np.testing.assert_allclose(step.distance_sq, dot(m, m), rtol=1e-3)


def test_share_step_and_smoothness_are_those_of_the_counted_round(toy, measured, two_rounds):
    """Oracle: the formulas of their definitions, of the second of two rounds and the loss after it."""
    sim, _, sample = toy
    (_, first), (after, step) = two_rounds
    end, _ = jax.jit(sim.full_gradient)(sim.world.base, sample, after.adapters, *AT_THREE)
    found = measured[3].measured
    np.testing.assert_allclose(found.gap, first.loss, rtol=1e-5)
    np.testing.assert_allclose(found.share, step.followed_sq / step.gradient_sq, rtol=1e-4)
    np.testing.assert_allclose(found.step, step.progress / step.followed_sq, rtol=1e-3)
    np.testing.assert_allclose(found.movement, step.movement, rtol=1e-3)
    rise = np.float64(end) - np.float64(step.loss) - np.float64(step.slope)
    np.testing.assert_allclose(found.smoothness, max(2 * rise / step.distance_sq, 0.0), rtol=0.02, atol=1e-6)
    for share, error in zip(found[-2:], (step.sparsification, step.covariance), strict=True):
        along = np.sum(np.maximum(error.slope, 0.0) ** 2) / step.gradient_sq
        np.testing.assert_allclose(share, min(along / np.sum(error.energy), 1.0), rtol=1e-2)


def test_with_everything_sent_what_the_server_misses_is_the_covariance(toy, trained, round_at_three):
    """Oracle: the identity `ideal - server = s Cov`; the aggregator reports its norm, from Gram matrices."""
    state, (after, step) = toy[1], round_at_three
    cohort, local, weights, _ = trained
    mask, scale = rank_mask(3, 4), 16 / 3
    everything = {name: jnp.ones((4, 4)) for name in state.adapters.modules}
    ideal = pilot._mean_movement(by_products, cohort.start, local.shown, everything, weights, mask, scale)
    server = pilot._movement(state.adapters, after.adapters, {}, mask, jnp.float32(scale))
    missed = sum(np.sum((np.float64(ideal.modules[n]) - np.float64(server.modules[n])) ** 2) for n in ideal.modules)
    np.testing.assert_allclose(step.covariance.norm_sq[2], missed, rtol=1e-3)
    assert step.sparsification.norm_sq[2] < 1e-4 * step.sparsification.norm_sq[1]


def test_each_error_has_the_slope_of_its_own_matrix(toy, trained, round_at_three):
    """Oracle: NumPy in float64, where two of three ranks are sent: E_s and Cov as matrices, from their definitions."""
    sim, state, sample = toy
    _, gradient = jax.jit(sim.full_gradient)(sim.world.base, sample, state.adapters, *AT_THREE)
    p, shown, sent = jax.tree.map(np.asarray, (trained[2], trained[1].shown, trained[3].received))
    scale, slopes, energies = 16 / 3, np.zeros(2), np.zeros(2)
    for name, g in gradient.modules.items():
        for layer in range(g.shape[0]):
            mine, got = (
                [np.float64(x[:, layer]) for x in (f.a[..., :3], f.b[:, :, :3])]
                for f in (shown.modules[name], sent.adapters.modules[name])
            )
            say = p[:, None] * sent.counted[name][:, layer, :3]
            w = np.where(say.sum(0) > 0, say / np.maximum(say.sum(0), 1e-30), p[:, None])
            a, b = np.einsum("ki,kni->ni", w, got[0]), np.einsum("ki,kio->io", w, got[1])
            decoded = np.einsum("ki,kni,kio->no", w, *got)
            e_s = np.einsum("k,kni,kio->no", np.float64(p), *mine) - decoded
            cov = np.einsum("ki,kni,kio->no", w, got[0] - a, got[1] - b)
            np.testing.assert_allclose(cov, decoded - a @ b, atol=1e-6)
            for i, error in enumerate((e_s, cov)):
                slopes[i] -= scale * np.sum(np.float64(g[layer]) * error)
                energies[i] += scale**2 * np.sum(error**2)
    step = round_at_three[1]
    for error, slope, energy in zip((step.sparsification, step.covariance), slopes, energies, strict=True):
        np.testing.assert_allclose(error.norm_sq[1], energy, rtol=1e-3)
        np.testing.assert_allclose(error.energy[1], energy, rtol=1e-3)
        np.testing.assert_allclose(error.slope[1], slope, rtol=1e-2, atol=1e-4 * np.sqrt(energy))
        assert error.slope[3] == error.energy[3] == 0  # beyond the rank


METHODS = [
    (fedit.METHOD, {}),
    (hetlora.METHOD, {"prune": 1.0}),
    (fedex.METHOD, {}),
    (flora.METHOD, {}),
    (flexlora.METHOD, {}),
    (lora_fair.METHOD, {}),
]


@pytest.mark.parametrize(("chosen", "options"), METHODS, ids=[method.name for method, _ in METHODS])
def test_each_error_is_weighed_as_its_method_weighs(toy, trained, chosen, options):
    """Oracle: the norms that the method reports, where two of three ranks are sent, each by those who chose them."""
    cohort, local, weights, upload = trained
    like = jax.eval_shape(lambda adapters: adapters, toy[1].adapters)
    method = chosen.make(chosen.options(**options), Context(num_clients=6, cohort_size=6, like=like))
    sent = upload.received
    start, mask, scale = cohort.start, rank_mask(3, 4), jnp.float32(16 / 3)
    found = method.aggregate(start, local.shown, sent, weights, scale, jax.random.key(0))
    everything = jax.tree.map(jnp.ones_like, sent.counted)
    ideal = pilot._mean_movement(by_products, start, local.shown, everything, weights, mask, scale).modules
    decoded = pilot._mean_movement(method.enter, start, sent.adapters, sent.counted, weights, mask, scale).modules
    server = pilot._movement(start, found.adapters, found.merged, mask, scale).modules
    reported = found.sparsification_error, found.covariance_error
    for norm, more, less in zip(reported, (ideal, decoded), (decoded, server), strict=True):
        apart = np.sqrt(sum(np.sum((np.float64(more[n]) - np.float64(less[n])) ** 2) for n in more))
        np.testing.assert_allclose(norm, apart, rtol=1e-3, atol=1e-4)
    assert reported[0] > 0.01


@pytest.fixture(scope="module")
def decaying():
    """Pilots of one small step, under a linear and a constant rate, and the first with twice the factors."""
    small, factors = ("local.steps=1", "local.optimizer.learning_rate=1e-4"), 1 - jnp.arange(2) / 6
    found = []
    for schedule, seen in (("linear", factors), ("constant", jnp.ones(2)), ("linear", 2 * factors)):
        sim, state, sample = started(*small, f"local.optimizer.schedule={schedule}")
        run = jax.jit(pilot.make_pilot(sim.make_parts, sim.full_gradient, seen))
        found.append(jax.device_get(run(sim.world, sample, state, jnp.float32(3))))
    return found


def test_a_pilot_under_a_schedule_measures_what_one_at_the_peak_rate_does(decaying):
    """Invariance to first order in the rate: the same batches at 5/6 of the rate move less, in proportion.

    A factor left out would be seen: it makes 1/6 of a movement, a third of an energy and half of that of Cov.
    """
    scheduled, constant, _ = decaying
    for name in ("gap", "share", "step", "movement"):
        np.testing.assert_allclose(
            getattr(scheduled.measured, name), getattr(constant.measured, name), rtol=0.03, err_msg=name
        )
    np.testing.assert_allclose(scheduled.sparsification, constant.sparsification, rtol=0.1, atol=1e-9)
    np.testing.assert_allclose(scheduled.covariance, constant.covariance, rtol=0.1)


def test_what_is_measured_is_per_factor_of_the_rate(decaying):
    """Closed form: twice the factors halve the step, quarter movement and E_s, and leave a sixteenth of Cov."""
    scheduled, _, doubled = decaying
    np.testing.assert_allclose(doubled.measured.step, scheduled.measured.step / 2, rtol=1e-5)
    np.testing.assert_allclose(doubled.measured.movement, scheduled.measured.movement / 4, rtol=1e-5)
    np.testing.assert_allclose(doubled.sparsification, scheduled.sparsification / 4, rtol=1e-5)
    np.testing.assert_allclose(doubled.covariance, scheduled.covariance / 16, rtol=1e-5)


def test_weights_are_the_mean_over_the_cohorts():
    """Oracle: NumPy over the cohorts that the keys of the counted rounds choose."""
    sim, state, sample = started("local.steps=1", "clients.per_round=3")
    run = jax.jit(pilot.make_pilot(sim.make_parts, sim.full_gradient, jnp.ones(3)))
    found, rows = run(sim.world, sample, state, jnp.float32(3)), []
    for number in (1, 2):
        keys = round_keys(state.key, jnp.int32(number))
        cohort = choose_cohort(sim.make_parts(state.numbers), sim.world, state, keys)
        count = np.asarray(cohort.clients.examples, np.float64) * np.asarray(cohort.present)
        rows.append(count / count.sum())
    assert np.ptp(rows, axis=0).max() > 0.01
    np.testing.assert_allclose(found.weights, np.mean(rows, 0), rtol=1e-5)


def test_a_pilot_measures_in_the_range_of_each_number(measured):
    for rank, found in measured.items():
        assert 0 < found.measured.share <= 1
        assert 0 <= found.measured.against_sparsification <= 1 and 0 <= found.measured.against_covariance <= 1
        assert found.measured.step > 0 and found.measured.movement > 0
        assert found.loss.shape == (3,) and found.measured.gap == found.loss[0]
        # Nothing is left out beyond the rank, and each rank fewer leaves out more.
        assert (np.diff(found.tail_energy) <= 1e-6).all()
        np.testing.assert_allclose(found.tail_energy[:, rank:], 0, atol=1e-6)
        np.testing.assert_allclose(np.diff(found.bits[rank:]), 0)
        np.testing.assert_allclose(found.weights.sum(), 1, rtol=1e-5)


def test_payloads_are_what_the_sparsifier_sends(trained, measured):
    """Oracle: the bits counted of a cohort's uploads, of whose three ranks two are kept."""
    cohort, _, _, upload = trained
    np.testing.assert_array_equal(upload.bits.exact(), measured[3].bits[2])
    np.testing.assert_array_equal(cohort.downlink.exact(), measured[3].downlink_bits)


def test_payloads_of_factors_in_turn_are_the_mean_of_two_rounds():
    """Oracle: what a run is charged in its second and third round, where b and a take turns."""
    sim = simulation("aggregation.name=rolora", "control.name=ideal", "control.keep_ratio=1.0", "rounds=3")
    state = sim.init(jax.random.key(0))
    bits, downlink_bits = pilot._payloads(sim.make_parts(sim.numbers), pilot.at_rank(state, jnp.float32(3)))
    _, metrics = sim.run(state, 3)
    assert metrics.uplink_bits[1] != metrics.uplink_bits[2]
    np.testing.assert_array_equal(bits[3], np.mean(metrics.uplink_bits[1:]) / 6)
    np.testing.assert_array_equal(downlink_bits, np.mean(metrics.downlink_bits[1:]) / 6)


@pytest.fixture(scope="module")
def data():
    """Of the toy, without a state of it."""
    return simulation().world.data


def test_held_out_examples_are_nobodys_any_more(data):
    """Oracle: sets of rows."""
    kept = hold_out(data, 10)

    def rows(d):
        return [set(np.asarray(own)[:count].tolist()) for own, count in zip(d.index, d.count, strict=True)]

    before, after = rows(data), rows(kept)
    assert all(new <= old and len(old) - len(new) == len(old) // 10 for old, new in zip(before, after, strict=True))
    held = sorted(set.union(*before) - set.union(*after))
    assert len(kept.test["label"]) == len(held) > 0
    labels = np.bincount(np.asarray(data.train["label"])[held], minlength=10)
    np.testing.assert_array_equal(np.bincount(np.asarray(kept.test["label"]), minlength=10), labels)


def test_holding_out_needs_enough_examples(data):
    data = dataclasses.replace(data, count=jnp.ones(6, jnp.int32))
    with pytest.raises(ValueError, match="clients must hold 10 examples"):
        hold_out(data, 10)
