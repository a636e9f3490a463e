"""Diagnostics against explicit component matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sparsifiers.diagnostics import difference_energy, dropped_energy, orthogonality
from oracles.sparsifier_oracle import LAYERS, RANK, components, product, random_adapters, rank_mask, trained_from

START = random_adapters(0)
MASK = jnp.asarray(rank_mask())
ORTHOGONALITY = jax.jit(orthogonality)
DIFFERENCE = jax.jit(difference_energy)


def test_orthogonality_equals_cosines_of_explicit_components():
    cosines = []
    for f in START.modules.values():
        for layer in range(LAYERS):
            parts = components(f, layer)[:RANK]
            for x, y in itertools.combinations(parts, 2):
                cosines.append(abs(np.sum(x * y)) / (np.linalg.norm(x) * np.linalg.norm(y)))
    np.testing.assert_allclose(ORTHOGONALITY(START, MASK), max(cosines), rtol=1e-5)


def test_orthogonality_of_zero_and_of_parallel_components():
    """Closed forms: 0 at b = 0, 1 for two equal components at any scale, 0 for one rank."""
    zero_b = Adapters({n: Factors(f.a, jnp.zeros_like(f.b)) for n, f in START.modules.items()}, {})
    assert ORTHOGONALITY(zero_b, MASK) == 0.0
    for scale in (1.0, 1e-25, 1e15):
        a = START.modules["query"].a.at[..., 1].set(START.modules["query"].a[..., 0])
        b = START.modules["query"].b.at[:, 1].set(2.0 * START.modules["query"].b[:, 0])
        parallel = Adapters({"query": Factors(a, scale * b)}, {})
        np.testing.assert_allclose(ORTHOGONALITY(parallel, MASK), 1.0, rtol=1e-5)
    assert ORTHOGONALITY(START, jnp.asarray(rank_mask(1))) == 0.0


def test_energies_equal_explicit_products():
    trained = trained_from(START, 1, step=1e-4)
    drop = {name: jnp.float32(np.random.default_rng(3).integers(0, 2, (LAYERS, 6))) for name in START.modules}
    dropped = difference = 0.0
    for name, f in trained.modules.items():
        for layer in range(LAYERS):
            chosen = np.flatnonzero(np.asarray(drop[name][layer]))
            dropped += np.sum(product(f, layer, chosen) ** 2)
            difference += np.sum((product(f, layer, chosen) - product(START.modules[name], layer, chosen)) ** 2)
    np.testing.assert_allclose(jax.jit(dropped_energy)(trained, drop), dropped, rtol=1e-5)
    np.testing.assert_allclose(DIFFERENCE(trained, START, drop), difference, rtol=1e-3)
    assert DIFFERENCE(trained, trained, drop) == 0.0
