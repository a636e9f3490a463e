"""Rotated SOFT against NumPy's SVD of each factor's change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sparsifiers.soft_rotated import SoftRotatedConfig, make
from oracles.contexts import context, offered_bits, upload
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, RANK, WIDTHS, product, random_adapters, scope, trained_from

KEY = jax.random.key(0)
START = random_adapters(0)
SCOPE = scope()
METHOD = make(SoftRotatedConfig(), context(START))
UPLOAD = jax.jit(upload(METHOD))


def send(trained, kept):
    return UPLOAD(START, trained, (), jnp.float32(kept), SCOPE, KEY)


def truncated(change, kept):
    u, s, vt = np.linalg.svd(np.float64(change), full_matrices=False)
    return (u[:, :kept] * s[:kept]) @ vt[:kept], np.sum(s[kept:] ** 2)


@pytest.mark.parametrize("step", [0.3, 1e-4])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_each_factor_is_its_best_approximation(kept, step):
    """Eckart-Young for the changes of a and of b, also for changes whose squares are tiny."""
    trained = trained_from(START, 1, step)
    sent = send(trained, kept)
    for name in START.modules:
        for side in ("a", "b"):
            before, after = (np.asarray(getattr(x.modules[name], side)) for x in (START, trained))
            decoded = np.asarray(getattr(sent.adapters.modules[name], side))
            for layer in range(LAYERS):
                best, _ = truncated(after[layer] - before[layer], kept)
                np.testing.assert_allclose(decoded[layer] - before[layer], best, atol=1e-5 * step + 1e-6)


def test_tail_energy_equals_singular_values_left_out():
    """NumPy's SVD of every change, both factors."""
    trained = trained_from(START, 1)
    found = jax.jit(METHOD.offer)(START, trained, SCOPE).tail_energy
    for k in range(MAX_RANK + 1):
        expected = sum(
            truncated(getattr(trained.modules[name], side)[layer] - getattr(f0, side)[layer], k)[1]
            for name, f0 in START.modules.items()
            for side in ("a", "b")
            for layer in range(LAYERS)
        )
        np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-4)


def test_dropped_energy_equals_explicit_products():
    """Of the decoded adapters, product by product."""
    trained = trained_from(START, 1)
    sent = send(trained, 2)
    expected = sum(
        np.sum((product(f, layer, range(RANK)) - product(sent.adapters.modules[name], layer, range(RANK))) ** 2)
        for name, f in trained.modules.items()
        for layer in range(LAYERS)
    )
    np.testing.assert_allclose(sent.dropped_energy, expected, rtol=1e-5)


def test_round_trip_at_full_rank_even_where_a_change_is_nearly_deficient():
    """Invariance: all r components rebuild a change with an eigenvalue below rounding, as of unused ranks."""
    trained = trained_from(START, 1)
    modules = {}
    for name, f in trained.modules.items():
        f0 = START.modules[name]
        change = f.a[..., 0] - f0.a[..., 0] + 1e-4 * f0.a[..., 5]
        modules[name] = Factors(a=f.a.at[..., 1].set(f0.a[..., 1] + change), b=f.b)
    trained = Adapters(modules=modules, head=trained.head)
    sent = send(trained, RANK)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), sent.adapters, trained)
    assert sent.dropped_energy < 1e-6


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_rotation_does_not_depend_on_the_scale_of_a_change(scale):
    """Invariance: a scaled change is approximated by the scaled approximation, from a broadcast of zero."""
    zero = jax.tree.map(jnp.zeros_like, START)
    change = trained_from(zero, 1)
    scaled = jax.tree.map(lambda x: scale * x, change)
    half = jnp.float32(RANK / 2)
    small = UPLOAD(zero, change, (), half, SCOPE, KEY)
    large = UPLOAD(zero, scaled, (), half, SCOPE, KEY)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(y / scale, x, atol=2e-5),
        small.adapters.modules,
        large.adapters.modules,
    )


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("unchanged", ["", "a", "ab"])
def test_bits_of_a_global_budget_are_those_of_what_arrives(kept, unchanged):
    """Oracle: NumPy's ranks of the decoded changes; where nothing changed, and all ties, no more than was planned."""
    method = make(SoftRotatedConfig(budget="global"), context(jax.eval_shape(lambda: START)))
    trained = trained_from(START, 1)
    for part in unchanged:
        old = {name: getattr(f, part) for name, f in START.modules.items()}
        modules = {name: f.replace(**{part: old[name]}) for name, f in trained.modules.items()}
        trained = Adapters(modules=modules, head=trained.head)
    sent = jax.jit(upload(method))(START, trained, (), jnp.float32(kept), SCOPE, KEY)
    assert sent.bits.exact() <= offered_bits(method, START, trained, SCOPE)[kept]
    if not unchanged:
        values, counts = sum(leaf.size for leaf in jax.tree.leaves(START.head)), {"a": 0, "b": 0}
        for name, f in sent.adapters.modules.items():
            for part, width in zip("ab", WIDTHS[name], strict=True):
                change = np.asarray(getattr(f, part)) - np.asarray(getattr(START.modules[name], part))
                found = np.linalg.matrix_rank(change, tol=1e-5).sum()
                counts[part] += found
                values += found * (width + RANK)
        matrices = LAYERS * len(WIDTHS)
        assert counts["a"] == counts["b"] == kept * matrices
        assert sent.bits.exact() == 32 * values + 2 * matrices * MAX_RANK.bit_length()


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="name must be 'soft_rotated', got 'soft'"):
        SoftRotatedConfig(name="soft")  # pyright: ignore[reportArgumentType]
