"""Random components, against counts over many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.sparsifiers import random_rank
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, RANK, WIDTHS, components, random_adapters, scope, trained_from

START = random_adapters(0)
TRAINED = trained_from(START, 1)
DRAWS = 600
METHOD = random_rank.make(random_rank.RandomRankConfig(), context(START))


@pytest.fixture(scope="module")
def draws():
    """What is sent at k = 2 of 4 with many keys."""
    send = jax.jit(jax.vmap(upload(METHOD), in_axes=(None, None, None, None, None, 0)))
    return send(START, TRAINED, (), jnp.float32(2), scope(), jax.random.split(jax.random.key(0), DRAWS))


def test_every_component_has_the_same_chance(draws):
    """Closed form k / r, within five standard errors; exactly k a matrix; none beyond the structural rank."""
    for mask in draws.counted.values():
        np.testing.assert_array_equal(mask.sum(-1), 2)
        np.testing.assert_allclose(mask[..., :RANK].mean(0), 0.5, atol=5 * 0.5 / DRAWS**0.5)
        assert not np.any(mask[..., RANK:])


def test_matrices_are_drawn_apart(draws):
    """Closed form: two of four ranks agree between any two matrices in one of six draws."""
    masks = np.concatenate([draws.counted[name] for name in WIDTHS], axis=1)
    for i in range(masks.shape[1]):
        for j in range(i):
            same = np.all(masks[:, i] == masks[:, j], axis=-1).mean()
            np.testing.assert_allclose(same, 1 / 6, atol=5 * (5 / 36 / DRAWS) ** 0.5)


def test_what_is_drawn_is_sent_and_the_rest_is_unchanged(draws):
    """Oracle: the mask, component by component, for one draw."""
    for name, f in draws.adapters.modules.items():
        for layer, i in np.ndindex(LAYERS, MAX_RANK):
            source = TRAINED if draws.counted[name][0, layer, i] else START
            error = 0.0 if source is START else 1e-6
            np.testing.assert_allclose(f.a[0, layer, :, i], source.modules[name].a[layer, :, i], rtol=0, atol=error)
            np.testing.assert_allclose(f.b[0, layer, i], source.modules[name].b[layer, i], rtol=0, atol=error)


def test_tail_energy_is_the_mean_over_draws(draws):
    """Monte Carlo: squared changes of what was left out, within five percent; zero where all is sent."""
    left_out = 0.0
    for name, f in TRAINED.modules.items():
        for layer in range(LAYERS):
            pairs = zip(components(f, layer), components(START.modules[name], layer), strict=True)
            energies = np.array([np.sum((c - c0) ** 2) for c, c0 in pairs])
            left_out += np.mean((1 - np.asarray(draws.counted[name])[:, layer]) @ energies)
    tails = METHOD.offer(START, TRAINED, scope()).tail_energy
    np.testing.assert_allclose(tails[2], left_out, rtol=0.05)
    np.testing.assert_allclose(tails[1], 1.5 * tails[2], rtol=1e-6)


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="missing must be one of senders, zero, got 'mean'"):
        random_rank.RandomRankConfig(missing="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="name must be 'random_rank', got 'random'"):
        random_rank.RandomRankConfig(name="random")  # pyright: ignore[reportArgumentType]
