"""SOFT: its exact facts, against explicit products, brute force and NumPy's SVD."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops import places
from fedjax_lora.sparsifiers import ranks
from fedjax_lora.sparsifiers.soft import SoftConfig, importance, make, orthogonality_penalty
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    RANK,
    WIDTHS,
    components,
    product,
    random_adapters,
    rank_mask,
    scope,
    trained_from,
)

KEY = jax.random.key(0)
START = random_adapters(0)
TRAINED = trained_from(START, 1)
MASK = jnp.asarray(rank_mask())


@functools.cache
def jitted(config):
    return jax.jit(upload(make(config, context(START))))


def uploaded(config, kept, start=START, trained=TRAINED, used=None):
    return jitted(config)(start, trained, (), jnp.float32(kept), used or scope(), KEY)


def orthogonal_sides(a_side, b_side):
    """Adapters whose a columns, b rows, or both are orthogonal, of distinct norms."""
    adapters = random_adapters(5)
    scale = 1.0 + np.random.default_rng(6).permutation(MAX_RANK)
    modules = {}
    for name, f in adapters.modules.items():
        a, b = np.array(f.a), np.array(f.b)
        for layer in range(LAYERS):
            if a_side:
                a[layer] = np.linalg.qr(a[layer])[0] * scale
            if b_side:
                b[layer, :5] = np.linalg.qr(b[layer].T)[0].T[:5]
        modules[name] = Factors(a=jnp.asarray(a), b=jnp.asarray(b))
    return Adapters(modules=modules, head=adapters.head)


def test_importance_equals_norm_of_explicit_component():
    f = TRAINED.modules["query"]
    for layer in range(LAYERS):
        expected = [np.linalg.norm(c) for c in components(f, layer)]
        np.testing.assert_allclose(importance(f.a[layer], f.b[layer]), expected, rtol=1e-6)
        np.testing.assert_allclose(importance(f.a, f.b)[layer], expected, rtol=1e-6)


@pytest.mark.parametrize("step", [0.3, 1e-3, 1e-5])
def test_importance_of_change_equals_norm_of_explicit_change(step):
    """Also for changes whose energy is 1e-10 of the factors': the textbook expansion has no digit left there."""
    trained = trained_from(START, 1, step)
    for name, f in trained.modules.items():
        f0 = START.modules[name]
        found = importance(f.a, f.b, f0.a, f0.b)
        for layer in range(LAYERS):
            pairs = zip(components(f, layer), components(f0, layer), strict=True)
            expected = [np.linalg.norm(c - c0) for c, c0 in pairs]
            np.testing.assert_allclose(found[layer], expected, rtol=1e-4)


@pytest.mark.parametrize("change", [False, True])
def test_importance_gradient_is_finite_at_zero_b(change):
    """Closed form: 0, the subgradient of least norm."""
    a, b = START.modules["query"].a, jnp.zeros_like(START.modules["query"].b)
    start = (a, b) if change else ()
    gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(importance(a, b, *start)), argnums=(0, 1)))(a, b)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("change", [False, True])
def test_importance_gradient_equals_finite_difference(change):
    f, f0 = TRAINED.modules["query"], START.modules["query"]
    direction = trained_from(TRAINED, 9).modules["query"]
    start = (f0.a, f0.b) if change else ()

    @jax.jit
    def along(t):
        a, b = f.a + t * (direction.a - f.a), f.b + t * (direction.b - f.b)
        return jnp.sum(importance(a, b, *start))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(along)(0.0), slope, rtol=2e-2)


def test_importance_names_bad_arguments():
    """The messages that the docstring promises."""
    with pytest.raises(ValueError, match="b must have the rank of a, 3, on its second last axis, got 4"):
        importance(jnp.ones((5, 3)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="a0 and b0 must be given together, got only a0"):
        importance(jnp.ones((5, 3)), jnp.ones((3, 5)), jnp.ones((5, 3)))


@pytest.mark.parametrize("form", ["offdiag", "identity", "a_only", "none"])
def test_penalty_equals_numpy_loop(form):
    f = START.modules["value"]
    expected = 0.0
    for layer in range(LAYERS):
        a, b = np.float64(f.a[layer])[:, :RANK], np.float64(f.b[layer])[:RANK]
        for i, j in itertools.product(range(RANK), repeat=2):
            target = 1.0 if i == j else 0.0
            if form == "identity" or (form == "offdiag" and i != j):
                expected += (a[:, i] @ a[:, j] - target) ** 2 + (b[i] @ b[j] - target) ** 2
            if form == "a_only" and i != j:
                expected += (a[:, i] @ a[:, j]) ** 2
    np.testing.assert_allclose(orthogonality_penalty(f.a, f.b, form, MASK), expected, rtol=1e-5)
    trimmed = orthogonality_penalty(f.a[..., :RANK], f.b[..., :RANK, :], form)
    np.testing.assert_allclose(trimmed, expected, rtol=1e-5)


def test_penalty_vanishes_for_orthogonal_factors_and_has_zero_gradient():
    """Closed form."""
    f = orthogonal_sides(True, True).modules["query"]
    b = f.b[:, :5]
    value, gradients = jax.jit(jax.value_and_grad(orthogonality_penalty, argnums=(0, 1)))(f.a[..., :5], b)
    assert value < 1e-6
    assert max(float(jnp.max(jnp.abs(g))) for g in gradients) < 1e-2
    assert orthogonality_penalty(f.a[..., :5] + 0.5, b) > 1.0


def test_penalty_of_all_modules_is_their_sum():
    """Invariance: the sparsifier's penalty is that of its modules, one by one, times its weight."""
    found = jax.jit(make(SoftConfig(form="identity", orthogonality=0.3), context(START)).penalty)(START, MASK)
    parts = [orthogonality_penalty(f.a, f.b, "identity", MASK) for f in START.modules.values()]
    np.testing.assert_allclose(found, 0.3 * sum(parts), rtol=1e-6)


@pytest.mark.parametrize("sides", [(True, False), (False, True)])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_top_ranks_are_the_best_subset_when_one_side_is_orthogonal(sides, kept):
    """Brute force over all subsets of k of r = 5 ranks."""
    rank = 5
    trained, used = orthogonal_sides(*sides), scope(rank)
    sent = uploaded(SoftConfig(send="factors"), kept, trained=trained, used=used)
    for name, f in trained.modules.items():
        for layer in range(LAYERS):
            left_out = {
                subset: np.sum(product(f, layer, set(range(rank)) - set(subset)) ** 2)
                for subset in itertools.combinations(range(rank), kept)
            }
            chosen = tuple(np.flatnonzero(np.asarray(sent.counted[name][layer])))
            assert left_out[chosen] <= min(left_out.values()) * (1 + 1e-5)
            sigma = np.float64(importance(f.a, f.b)[layer])
            rest = [i for i in range(rank) if i not in chosen]
            np.testing.assert_allclose(left_out[chosen], np.sum(sigma[rest] ** 2), rtol=1e-4)


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_top_ranks_are_the_truncated_svd_when_both_sides_are_orthogonal(kept):
    """Eckart-Young: NumPy's SVD of the explicit product."""
    rank = 5
    trained, used = orthogonal_sides(True, True), scope(rank)
    sent = uploaded(SoftConfig(send="factors"), kept, trained=trained, used=used)
    for name, f in trained.modules.items():
        for layer in range(LAYERS):
            u, s, vt = np.linalg.svd(product(f, layer, range(rank)), full_matrices=False)
            best = (u[:, :kept] * s[:kept]) @ vt[:kept]
            chosen = np.flatnonzero(np.asarray(sent.counted[name][layer]))
            np.testing.assert_allclose(product(sent.adapters.modules[name], layer, chosen), best, atol=1e-4)


@pytest.mark.parametrize("send", ["factors", "change"])
@pytest.mark.parametrize("budget", ["module", "global"])
def test_dropped_energy_equals_explicit_product(send, budget):
    """In general, factors neither orthogonal nor equal in norm."""
    sent = uploaded(SoftConfig(send=send, budget=budget), RANK / 2)
    expected = 0.0
    for name, f in TRAINED.modules.items():
        for layer in range(LAYERS):
            drop = [i for i in range(RANK) if sent.counted[name][layer, i] == 0]
            left_out = product(f, layer, drop)
            if send == "change":
                left_out = left_out - product(START.modules[name], layer, drop)
            expected += np.sum(left_out**2)
    np.testing.assert_allclose(sent.dropped_energy, expected, rtol=1e-5)


def test_global_budget_takes_the_largest_of_all_modules():
    """Oracle: NumPy's sort of all importances; a module may get none."""
    small = jax.tree.map(lambda x: 1e-3 * x, TRAINED.modules["value"])
    trained = Adapters(modules={**TRAINED.modules, "value": small}, head=TRAINED.head)
    sent = uploaded(SoftConfig(budget="global", send="factors"), RANK / 2, trained=trained)
    everything = []
    for name, f in trained.modules.items():
        sigma = np.asarray(importance(f.a, f.b))
        everything += [(sigma[layer, i], name, layer, i) for layer in range(LAYERS) for i in range(RANK)]
    count = RANK // 2 * LAYERS * len(WIDTHS)
    expected = {entry[1:] for entry in sorted(everything, reverse=True)[:count]}
    found = {
        (name, layer, i) for name, mask in sent.counted.items() for layer, i in np.argwhere(np.asarray(mask)).tolist()
    }
    assert found == expected
    assert not np.any(sent.counted["value"])
    assert sent.kept_ranks == RANK // 2


@pytest.mark.parametrize("send", ["factors", "change"])
@pytest.mark.parametrize("missing", ["senders", "zero"])
def test_decoding_table(send, missing):
    """Oracle: the rule of each option, component by component; ranks not in use stay as broadcast.

    To the bit but for changes that are added back.
    """
    sent = uploaded(SoftConfig(send=send, missing=missing), RANK / 2)
    chosen = uploaded(SoftConfig(send=send), RANK / 2).counted
    for name, f in sent.adapters.modules.items():
        for layer, i in itertools.product(range(LAYERS), range(MAX_RANK)):
            source = TRAINED if chosen[name][layer, i] else START
            a, b = source.modules[name].a[layer, :, i], source.modules[name].b[layer, i]
            if i < RANK and not chosen[name][layer, i] and (send, missing) == ("factors", "zero"):
                a, b = jnp.zeros_like(a), jnp.zeros_like(b)
            error = 1e-6 if source is TRAINED and send == "change" else 0.0
            np.testing.assert_allclose(f.a[layer, :, i], a, rtol=0, atol=error)
            np.testing.assert_allclose(f.b[layer, i], b, rtol=0, atol=error)
            counts = chosen[name][layer, i] if missing == "senders" else float(i < RANK)
            assert sent.counted[name][layer, i] == counts
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), sent.adapters.head, TRAINED.head)


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_number_kept_is_floor_with_at_least_one(rank):
    """Closed form max(1, floor(kept)), at most r; also where k was rounded down, as a ratio or as itself."""
    mask = jnp.asarray(rank_mask(rank))
    for k in range(1, rank + 1):
        assert ranks.whole(jnp.float32(k), mask) == k
        assert ranks.whole(jnp.float32(k / rank) * rank, mask) == k
        assert ranks.whole(jnp.nextafter(jnp.float32(k / rank), jnp.float32(0)) * rank, mask) == k
        assert ranks.whole(jnp.nextafter(jnp.float32(k), jnp.float32(0)), mask) == k
        assert ranks.whole(jnp.float32(k - 0.01), mask) == max(1, k - 1)
    assert ranks.whole(jnp.float32(0.0), mask) == 1
    assert ranks.whole(jnp.float32(rank + 1), mask) == rank
    np.testing.assert_array_equal(ranks.each(mask), [min(max(k, 1), rank) for k in range(MAX_RANK + 1)])


def test_equal_scores_go_to_the_first():
    """Closed form, per matrix and over the adapter."""
    np.testing.assert_array_equal(ranks.largest(jnp.array([0.0, 2.0, 0.0, 0.0]), jnp.uint32(2)), [1, 1, 0, 0])
    scores = {"value": jnp.zeros((1, 2)), "query": jnp.zeros((1, 2))}
    found = ranks.largest_overall(scores, jnp.uint32(3))
    np.testing.assert_array_equal(found["query"], [[1, 1]])
    np.testing.assert_array_equal(found["value"], [[1, 0]])


@pytest.mark.parametrize("send", ["factors", "change"])
def test_tail_energy_equals_sorted_importances(send):
    """NumPy: each matrix's squared importances, sorted, summed from k on."""
    tails = make(SoftConfig(send=send), context(START)).offer(START, TRAINED, scope()).tail_energy
    expected = np.zeros(MAX_RANK + 1)
    for name, f in TRAINED.modules.items():
        f0 = START.modules[name]
        sigma = np.float64(importance(f.a, f.b) if send == "factors" else importance(f.a, f.b, f0.a, f0.b))
        for layer in range(LAYERS):
            ordered = np.sort(sigma[layer, :RANK] ** 2)[::-1]
            for k in range(RANK):
                expected[k] += ordered[k:].sum()
    np.testing.assert_allclose(tails, expected, rtol=1e-5)


def test_tail_energy_of_global_budget_equals_what_is_left_out():
    """Oracle: the importances of the components that are left out at every k."""
    method = make(SoftConfig(budget="global", send="factors"), context(START))
    tails = method.offer(START, TRAINED, scope()).tail_energy
    for k in range(1, RANK + 1):
        counted = uploaded(SoftConfig(budget="global", send="factors"), k).counted
        left = [importance(f.a, f.b) ** 2 * (MASK - counted[name]) for name, f in TRAINED.modules.items()]
        np.testing.assert_allclose(tails[k], sum(jnp.sum(x) for x in left), rtol=1e-5)


def test_tails_equal_numpy_and_never_rise():
    """NumPy in float64; and to the last bit non-increasing, over energies of many magnitudes."""
    for seed in range(20):
        energies = np.float32(np.random.default_rng(seed).lognormal(0, 4, 200))
        found = np.asarray(ranks.tails(jnp.asarray(energies)))
        expected = np.append(np.cumsum(energies[::-1].astype(np.float64))[::-1], 0.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.all(np.diff(found) <= 0)


def test_degeneracy_is_named():
    """The combinations that turn into something else, by what the rest of the experiment breaks."""
    assert SoftConfig().note(()) is None
    assert SoftConfig(missing="zero").note(()) is None
    assert SoftConfig(send="factors", missing="zero").note({"lasting_zeros"}) is None
    feedback = SoftConfig(error_feedback=True)
    assert feedback.note(()) is None
    assert "error_feedback" in str(feedback.note({"full_participation"}))
    note = SoftConfig(send="factors", missing="zero").note({"full_participation"})
    assert note is not None and "fixed rank" in note
    note = SoftConfig(form="identity").note(())
    assert note is not None and "form: identity" in note
    assert SoftConfig(form="identity", orthogonality=0.0).note(()) is None


def test_properties_name_the_option_that_asks_for_them():
    """The options themselves: `missing` before `send`, and error feedback alone needs a basis that stays."""
    assert SoftConfig().breaks() == {"unchanged_where_unsent": "missing"}
    assert SoftConfig(send="factors", missing="zero").breaks() == {"unchanged_where_unsent": "send"}
    assert SoftConfig(missing="zero").breaks() == {} == SoftConfig().needs()
    feedback = SoftConfig(missing="zero", error_feedback=True)
    assert feedback.needs() == {"fixed_basis": "error_feedback"}
    assert feedback.breaks() == {"whole_tail": "error_feedback"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonality": -1.0}, "orthogonality must be finite and at least 0, got -1.0"),
        ({"orthogonality": float("nan")}, "orthogonality must be finite and at least 0, got nan"),
        ({"form": "off"}, "form must be one of offdiag, identity, a_only, none, got 'off'"),
        ({"form": "none"}, "orthogonality must be 0 where form is none, got 0.1"),
        ({"send": "all"}, "send must be one of factors, change, got 'all'"),
        ({"missing": "mean"}, "missing must be one of senders, zero, got 'mean'"),
        ({"budget": "layer"}, "budget must be one of module, global, got 'layer'"),
        ({"name": "topk"}, "name must be 'soft', got 'topk'"),
    ],
)
def test_config_names_field_and_value(options, message):
    """The message itself."""
    with pytest.raises(ValueError) as error:
        SoftConfig(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("size", [1, 3, 8, 64, places.COUNTED + 1])
def test_the_largest_are_those_of_a_stable_sort_numpy(size):
    """With equals, infinities and NaN, which comes first."""
    scores = np.round(np.random.default_rng(0).normal(size=(40, size)), 1).astype(np.float32)
    scores[0], scores[1, 0], scores[2, -1], scores[3] = -1, np.inf, np.nan, np.nan
    found = ranks.largest(jnp.asarray(scores), jnp.uint32(min(3, size)))
    order = np.argsort(-np.where(np.isnan(scores), np.inf, scores), axis=-1, kind="stable")
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, order[:, :3], 1.0, axis=-1)
    np.testing.assert_array_equal(found, expected)
