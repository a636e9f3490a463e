"""FedIT against a NumPy loop over clients, layers and ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation.fedit import FedItConfig, make
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.methods import Context
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, WIDTHS, fedit, product, random_adapters

AGGREGATE = jax.jit(make(FedItConfig(), Context(num_clients=4, cohort_size=4)).aggregate)
BROADCAST = random_adapters(0)
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
SCALE = jnp.float32(2.0)
KEY = jax.random.key(0)


def cohort(seed=1):
    """Trained and decoded adapters of four clients, and who counts where: nobody in component 3 of any layer."""
    trained, decoded = random_adapters(seed, clients=4), random_adapters(seed + 1, clients=4)
    generator = np.random.default_rng(seed + 2)
    counted = {name: generator.integers(0, 2, (4, LAYERS, MAX_RANK)).astype(np.float32) for name in WIDTHS}
    for mask in counted.values():
        mask[..., 3] = 0
    return trained, decoded, counted


def message(decoded, counted):
    return Received(adapters=decoded, counted=jax.tree.map(jnp.asarray, counted))


def test_average_equals_loop():
    trained, decoded, counted = cohort()
    found = AGGREGATE(BROADCAST, trained, message(decoded, counted), jnp.float32(WEIGHTS), SCALE, KEY)
    averages, _ = fedit(BROADCAST, decoded, counted, WEIGHTS)
    for name, (a, b) in averages.items():
        np.testing.assert_allclose(found.adapters.modules[name].a, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.adapters.modules[name].b, b, rtol=1e-5, atol=1e-6)
    for name, leaf in found.adapters.head.items():
        expected = sum(p * np.float64(decoded.head[name][k]) for k, p in enumerate(WEIGHTS))
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_component_of_nobody_stays_as_broadcast():
    """Invariance, to the bit."""
    trained, decoded, counted = cohort()
    found = AGGREGATE(BROADCAST, trained, message(decoded, counted), jnp.float32(WEIGHTS), SCALE, KEY)
    for name, f in BROADCAST.modules.items():
        np.testing.assert_array_equal(found.adapters.modules[name].a[..., 3], f.a[..., 3])
        np.testing.assert_array_equal(found.adapters.modules[name].b[:, 3], f.b[:, 3])


def test_identity_of_averages_and_both_error_norms():
    """Explicit matrices: ideal = product of averages + Cov + E_s to 1e-5, and the norms are those of the terms."""
    trained, decoded, counted = cohort()
    found = AGGREGATE(BROADCAST, trained, message(decoded, counted), jnp.float32(WEIGHTS), SCALE, KEY)
    averages, w = fedit(BROADCAST, decoded, counted, WEIGHTS)
    sparsification = covariance = 0.0
    for name, old in BROADCAST.modules.items():
        for layer in range(LAYERS):
            ideal, cov, e_s = 0.0, 0.0, 0.0
            for k, p in enumerate(WEIGHTS):
                mine = jax.tree.map(lambda x, k=k: x[k], trained.modules[name])
                ideal = ideal + p * product(mine, layer)
                e_s = e_s + p * product(mine, layer)
                for i in range(MAX_RANK):
                    weight = w[name][k, layer, i]
                    a = np.float64(decoded.modules[name].a[k, layer, :, i])
                    b = np.float64(decoded.modules[name].b[k, layer, i])
                    if w[name][:, layer, i].sum() == 0:  # nobody counts: all are taken to hold the broadcast
                        weight, a, b = p, np.float64(old.a[layer, :, i]), np.float64(old.b[layer, i])
                    mean_a, mean_b = averages[name][0][layer, :, i], averages[name][1][layer, i]
                    cov = cov + weight * np.outer(a - mean_a, b - mean_b)
                    e_s = e_s - weight * np.outer(a, b)
            server = product(found.adapters.modules[name], layer)
            np.testing.assert_allclose(ideal, server + cov + e_s, atol=1e-5)
            covariance, sparsification = covariance + np.sum(cov**2), sparsification + np.sum(e_s**2)
    np.testing.assert_allclose(found.covariance_error, 2 * np.sqrt(covariance), rtol=1e-5)
    np.testing.assert_allclose(found.sparsification_error, 2 * np.sqrt(sparsification), rtol=1e-5)


def test_nothing_left_out_and_equal_clients_have_no_error():
    """Closed form: both errors 0 for four copies of one client, sent whole; the average is that client."""
    one = random_adapters(3)
    trained = jax.tree.map(lambda x: jnp.stack([x] * 4), one)
    counted = {name: np.ones((4, LAYERS, MAX_RANK), np.float32) for name in WIDTHS}
    found = AGGREGATE(BROADCAST, trained, message(trained, counted), jnp.full(4, 0.25), SCALE, KEY)
    assert found.sparsification_error < 1e-5
    assert found.covariance_error < 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found.adapters, one)


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="name must be 'fedit', got 'fedavg'"):
        FedItConfig(name="fedavg")  # pyright: ignore[reportArgumentType]
