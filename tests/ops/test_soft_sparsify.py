"""Both implementations of soft_sparsify against a loop in float64 NumPy, and against the sparsifier itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.ops.soft_sparsify import soft_sparsify
from fedjax_lora.sparsifiers import payload, soft
from oracles.contexts import context

IMPLEMENTATIONS = ["xla", "pallas"]
# Clients, layers, n_in, n_out, ranks: one client; widths that no power of two divides.
SHAPES = [(1, 1, 5, 7, 1), (2, 2, 13, 6, 3), (3, 1, 24, 10, 8), (1, 1, 9, 20, 64)]


def changed(clients, layers, n_in, n_out, ranks):
    """Factors of clients, where they started from, components to keep, and masks of the ranks in use."""
    generator = np.random.default_rng(0)
    start = [generator.standard_normal((layers, *shape)) for shape in ((n_in, ranks), (ranks, n_out))]
    trained = [x + 0.3 * generator.standard_normal((clients, *x.shape)) for x in start]
    kept = np.float32(generator.integers(1, ranks + 1, clients))
    used = np.ones((clients, ranks), np.float32)
    if ranks > 2:
        used[0, -1] = 0
    return Factors(*map(jnp.float32, trained)), Factors(*map(jnp.float32, start)), kept, used


def by_hand(trained, start, kept, used):
    """Importance, and for each matrix its chosen ranks, the most important first, by products of the factors."""
    a, b, a0, b0 = (np.float64(x) for x in (trained.a, trained.b, start.a, start.b))
    change = np.einsum("clir,clro->clrio", a, b) - np.einsum("lir,lro->lrio", a0, b0)
    importance = np.sqrt(np.sum(change**2, (-1, -2)))
    chosen = {}
    for client, layer in np.ndindex(importance.shape[:2]):
        order = sorted(np.flatnonzero(used[client]), key=lambda r: -importance[client, layer, r])
        chosen[client, layer] = order[: int(kept[client])]
    return importance, chosen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sent_in_its_place_equals_float64(shape, implementation):
    trained, start, kept, used = changed(*shape)
    importance, chosen = by_hand(trained, start, kept, used)
    found = jax.jit(functools.partial(soft_sparsify, implementation=implementation))(trained, start, kept, used)
    np.testing.assert_allclose(found.importance, importance, rtol=1e-5, atol=1e-5)
    ranks, values = shape[-1], shape[2] + shape[3]
    for (client, layer), order in chosen.items():
        mask = np.isin(np.arange(ranks), order)
        np.testing.assert_array_equal(found.chosen[client, layer], mask)
        for sent, x, x0, place in (
            (found.a, trained.a, start.a, mask[None]),
            (found.b, trained.b, start.b, mask[:, None]),
        ):
            np.testing.assert_array_equal(sent[client, layer], np.where(place, x[client, layer] - x0[layer], 0))
        energy = importance[client, layer] ** 2 * used[client]
        np.testing.assert_allclose(found.kept_energy[client, layer], energy[mask].sum(), rtol=1e-5)
        np.testing.assert_allclose(found.dropped_energy[client, layer], energy[~mask].sum(), rtol=1e-5, atol=1e-6)
        index = min(ranks, len(order) * (ranks - 1).bit_length())
        assert found.bits[client, layer] == 32 * values * len(order) + index


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_slots_hold_what_is_sent_the_most_important_first(shape, implementation):
    """Oracle: the order by hand; no more is kept than there are slots, and what is left of them is empty."""
    trained, start, kept, used = changed(*shape)
    slots = max(shape[-1] // 2, 1)
    _, chosen = by_hand(trained, start, kept, used)
    pack = functools.partial(soft_sparsify, slots=slots, implementation=implementation)
    found = jax.jit(pack)(trained, start, kept, used)
    for (client, layer), order in chosen.items():
        order = order[:slots]
        expected = np.pad(order, (0, slots - len(order)), constant_values=-1)
        np.testing.assert_array_equal(found.chosen[client, layer], expected)
        of_a = (trained.a[client, layer] - start.a[layer]).T
        of_b = trained.b[client, layer] - start.b[layer]
        for sent, change in ((found.a, of_a), (found.b, of_b)):
            np.testing.assert_array_equal(sent[client, layer, : len(order)], change[np.array(order)])
            np.testing.assert_array_equal(sent[client, layer, len(order) :], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_message_of_the_sparsifier(implementation):
    """Oracle: `sparsifiers.soft`, one client: tensors, dropped energy, and bits but for the head's."""
    trained, start, kept, used = changed(1, 2, 13, 6, 3)
    like = Adapters(modules={"query": start}, head={})
    method = soft.make(soft.SoftConfig(), context(like=like))
    own = Adapters(modules={"query": jax.tree.map(lambda x: x[0], trained)}, head={})
    scope = Scope.whole(jnp.asarray(used[0]))
    message = jax.jit(method.encode)(like, own, (), kept[0], scope, jax.random.key(0))
    found = soft_sparsify(trained, start, kept, used, implementation=implementation)
    np.testing.assert_array_equal(found.a[0], message.tensors.modules["query"].a)
    np.testing.assert_array_equal(found.b[0], message.tensors.modules["query"].b)
    assert int(np.sum(found.bits)) == payload.bits(payload.message_size(message)).exact()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [None, 2])
def test_gradients_equal_finite_differences(slots, implementation):
    """Central differences of the reference in float64, along a direction: the choice stays, so the sum is smooth."""
    trained, start, _, used = changed(2, 1, 5, 4, 3)
    kept, generator = np.float32([1, 2]), np.random.default_rng(3)
    directions = [jnp.float32(generator.standard_normal(x.shape)) for x in (*jax.tree.leaves((trained, start)),)]

    def total(values, implementation=implementation):
        a, b, a0, b0 = values
        found = soft_sparsify(Factors(a, b), Factors(a0, b0), kept, used, slots=slots, implementation=implementation)
        return jnp.sum(found.a**2) + jnp.sum(jnp.sin(found.b)) + jnp.sum(found.kept_energy)

    values = list(jax.tree.leaves((trained, start)))
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.jit(jax.grad(total))(values), directions, strict=True))
    with jax.enable_x64(True):
        wide = [jnp.float64(np.float64(x)) for x in values]
        step = [1e-6 * jnp.float64(np.float64(d)) for d in directions]
        exact = jax.jit(functools.partial(total, implementation="xla"))
        ahead, behind = (exact([x + sign * d for x, d in zip(wide, step, strict=True)]) for sign in (1.0, -1.0))
        expected = float(ahead - behind) / 2e-6
    assert float(slope) == pytest.approx(expected, rel=1e-4)


def test_bad_arguments_name_what_is_allowed():
    """The messages that the docstring promises."""
    trained, start, kept, used = changed(2, 1, 5, 4, 3)
    with pytest.raises(ValueError, match="slots must be None or from 1 to 3, got 4"):
        soft_sparsify(trained, start, kept, used, slots=4)
    with pytest.raises(ValueError, match=r"start must have the shapes of one client, got \(2, 1, 5, 3\)"):
        soft_sparsify(trained, trained, kept, used)
