"""The truncated SVD without a product, against the SVD of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sparsifiers import svd
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    RANK,
    product,
    random_adapters,
    rank_mask,
    scope,
    stack,
    trained_from,
)

KEY = jax.random.key(0)
START = random_adapters(0)
TRAINED = trained_from(START, 1)
METHOD = svd.make(svd.SvdConfig(), context(START))
UPLOAD = jax.jit(upload(METHOD))


def send(kept, trained=TRAINED, used=None):
    return UPLOAD(START, trained, (), jnp.float32(kept), used or scope(), KEY)


def truncated(matrix, kept):
    """NumPy's best approximation of rank k, and its error squared."""
    u, s, vt = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return (u[:, :kept] * s[:kept]) @ vt[:kept], np.sum(s[kept:] ** 2)


@pytest.mark.parametrize("shape", [(12, 20), (20, 7), (9, 9)])
def test_thin_equals_full(shape):
    """The SVD of the explicit product: values, and the product of every number of triples."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((3, shape[0], 5)), generator.standard_normal((3, 5, shape[1]))
    thin, full = (jax.jit(f)(jnp.float32(a), jnp.float32(b)) for f in (svd.thin_svd, svd.full_svd))
    assert [x.shape for x in thin] == [x.shape for x in full] == [(3, shape[0], 5), (3, 5), (3, shape[1], 5)]
    np.testing.assert_allclose(thin.s, full.s, rtol=1e-5)
    for kept in range(1, 6):
        products = [np.einsum("mik,mk,mok->mio", *(np.float64(x)[..., :kept] for x in found)) for found in (thin, full)]
        np.testing.assert_allclose(products[0], products[1], atol=1e-4)
    for vectors in (thin.u, thin.v):
        gram = np.einsum("mni,mnj->mij", vectors, vectors)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(5), gram.shape), atol=1e-5)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_decoded_product_is_the_best_of_its_rank(kept):
    """Eckart-Young: NumPy's SVD of every explicit product; what is left out is what it leaves out."""
    sent, left_out = send(kept), 0.0
    for name, f in TRAINED.modules.items():
        for layer in range(LAYERS):
            best, rest = truncated(product(f, layer, range(RANK)), kept)
            found = product(sent.adapters.modules[name], layer, range(RANK))
            np.testing.assert_allclose(found, best, atol=2e-5)
            left_out += rest if kept < RANK else 0.0
    np.testing.assert_allclose(sent.dropped_energy, left_out, rtol=1e-5)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_one_factor_alone_gives_the_same_product(factor):
    """Eckart-Young again, where the other factor is frozen."""
    used = scope(factors=factor)
    trained = used.select(TRAINED, START)
    sent = send(2, trained, used)
    for name, f in trained.modules.items():
        for layer in range(LAYERS):
            best, _ = truncated(product(f, layer, range(RANK)), 2)
            np.testing.assert_allclose(product(sent.adapters.modules[name], layer, range(RANK)), best, atol=2e-5)


@pytest.mark.parametrize("side", ["zero b", "zero a", "rank one"])
def test_round_trip_at_full_rank_even_where_the_product_is_deficient(side):
    """Invariance: all r triples rebuild both factors, also from a product without energy in some of them."""
    modules = {}
    for name, f in TRAINED.modules.items():
        used = Factors(a=f.a * rank_mask(), b=f.b * rank_mask()[:, None])
        if side == "rank one":
            used = Factors(a=used.a, b=used.b.at[:, 1:].set(0.0))
        modules[name] = used.replace(**{side[-1]: jnp.zeros_like(getattr(used, side[-1]))}) if "zero" in side else used
    zero = jax.tree.map(jnp.zeros_like, START)
    sent = UPLOAD(zero, Adapters(modules, START.head), (), jnp.float32(RANK), scope(), KEY)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), sent.adapters.modules, modules)


def test_tail_energy_equals_singular_values_left_out():
    """NumPy's SVD of every product."""
    found = jax.jit(METHOD.offer)(START, TRAINED, scope()).tail_energy
    for k in range(MAX_RANK + 1):
        expected = sum(
            truncated(product(f, layer, range(RANK)), k)[1] for f in TRAINED.modules.values() for layer in range(LAYERS)
        )
        np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_triples_do_not_depend_on_the_scale_of_a_factor(scale):
    """Invariance: scaling b scales the decoded b alone."""
    modules = {name: f.replace(b=scale * f.b) for name, f in TRAINED.modules.items()}
    small, large = send(2), send(2, Adapters(modules, TRAINED.head))
    for name, f in small.adapters.modules.items():
        other = large.adapters.modules[name]
        np.testing.assert_allclose(other.a[..., :RANK], f.a[..., :RANK], atol=2e-5)
        np.testing.assert_allclose(other.b[:, :RANK] / scale, f.b[:, :RANK], atol=2e-5)


def test_factors_keep_the_basis_of_the_client():
    """Against balanced factors: nearer clients average with a smaller covariance error, at the same products."""
    clients = [trained_from(START, seed, step=0.05) for seed in (1, 2, 3)]
    ours = stack([send(2, client).adapters for client in clients])
    modules = {}
    for name, f in START.modules.items():
        a, b = np.zeros((3, *f.a.shape), np.float32), np.zeros((3, *f.b.shape), np.float32)
        for client, layer in np.ndindex(3, LAYERS):
            u, s, vt = np.linalg.svd(product(clients[client].modules[name], layer, range(RANK)))
            a[client, layer, :, :2], b[client, layer, :2] = u[:, :2] * s[:2] ** 0.5, s[:2, None] ** 0.5 * vt[:2]
        modules[name] = Factors(a=jnp.asarray(a), b=jnp.asarray(b))
    balanced = Adapters(modules, ours.head)
    assert 2 * covariance_error(ours) < covariance_error(balanced)


def covariance_error(received):
    """Distance of the mean of three clients' products from the product of their mean factors; NumPy."""
    error = 0.0
    for f in received.modules.values():
        a, b = (np.float64(x) for x in (f.a[..., :RANK], f.b[..., :RANK, :]))
        error += np.sum(((a @ b).mean(0) - a.mean(0) @ b.mean(0)) ** 2)
    return error**0.5


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="name must be 'svd', got 'SVD'"):
        svd.SvdConfig(name="SVD")  # pyright: ignore[reportArgumentType]
