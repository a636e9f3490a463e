"""The vision transformer: shapes, the order of its patches, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import layers, load, vit
from oracles.model_context import model_context


def build(pooling="mean"):
    config = vit.VitConfig(
        height=6, width=8, channels=2, patch=2, hidden=12, num_layers=2, num_heads=3, mlp_width=20, pooling=pooling
    )
    made = model_context(5).made
    return vit.vit(config, made["task"], made["adapter"])


@pytest.fixture(scope="module")
def small():
    model, random = build(), np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.2 * random.normal(size=shape), jnp.float32)

    modules = {
        name: Factors(a=normal(2, site.n_in, 4), b=normal(2, 4, site.n_out)) for name, site in model.sites.items()
    }
    adapters = Adapters(modules=modules, head={"w": normal(12, 5), "b": normal(5)})
    image = jnp.asarray(random.uniform(size=(3, 6, 8, 2)), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0)), adapters, {"image": image}


@pytest.mark.parametrize(("pooling", "positions"), [("mean", 12), ("cls", 13)])
def test_shapes_closed_form(pooling, positions):
    model = build(pooling)
    base = jax.eval_shape(model.init, jax.random.key(0))
    assert base["layers"]["up"]["w"].shape == (2, 12, 20)
    batch = {"image": jnp.zeros((3, 6, 8, 2))}
    hidden = jax.eval_shape(model.embed, base, batch, None)
    assert hidden.values.shape == (3, positions, 12) and hidden.mask.shape == (3, positions)
    adapters = Adapters(modules={}, head=jax.eval_shape(model.init_head, jax.random.key(0)))
    assert jax.eval_shape(model.apply, base, adapters, batch).shape == (3, 5)


def test_embedding_against_a_loop_over_patches(small):
    model, base, _, batch = small
    image = np.asarray(batch["image"])
    got = jax.jit(lambda base: model.embed(base, batch, None))(base).values
    weights = jax.tree.map(np.asarray, base["embeddings"])
    for row in range(3):
        for column in range(4):
            patch = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(3, 8)
            position = row * 4 + column
            expected = patch @ weights["patch"]["w"] + weights["patch"]["b"] + weights["position"][position]
            np.testing.assert_allclose(got[:, position], expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_adapters_and_base_by_finite_differences(small):
    model, base, adapters, batch = small

    @jax.jit
    def loss(trained):
        base, adapters = trained
        return (model.apply(base, adapters, batch) ** 2).sum()

    trained = (base, adapters)
    gradient = jax.jit(jax.grad(loss))(trained)
    length = float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))))

    def along(distance):
        return loss(jax.tree.map(lambda x, g: x + distance * g / length, trained, gradient))

    np.testing.assert_allclose((along(1e-3) - along(-1e-3)) / 2e-3, length, rtol=5e-3)
    for leaf in jax.tree.leaves(gradient[1]):
        assert jnp.abs(leaf).max() > 0


def test_tiny_is_the_documented_model_for_digits():
    model, base = load.build_model(load.ModelConfig(), model_context(10, (8, 8, 1)))
    assert base is None
    assert model.num_layers == 4
    assert model.sites["query"][2:4] == (64, 64) and model.sites["down"][2:4] == (256, 64)
    base = jax.eval_shape(model.init, jax.random.key(0))
    assert base["embeddings"]["position"].shape == (4, 64)


def test_sides_must_be_multiples_of_the_patch():
    with pytest.raises(ValueError, match="image sides must be multiples of 4, got 7 x 8"):
        vit.tiny((7, 8, 1))


def test_an_image_of_another_shape_is_refused(small):
    model, base, adapters, _ = small
    with pytest.raises(ValueError, match=r"image must be \[B, 6, 8, 2\], got \(3, 8, 6, 2\)"):
        model.apply(base, adapters, {"image": jnp.zeros((3, 8, 6, 2))})


def test_dropout_of_an_example_does_not_depend_on_the_places_after_it():
    """Invariance, bit for bit: a batch cut to what is filled drops what the whole batch did."""
    x, key = np.random.default_rng(0).normal(size=(40, 3, 5)), jax.random.key(1)
    few, all_places = (layers.dropout(jnp.float32(part), 0.3, key) for part in (x[:13], x))
    np.testing.assert_array_equal(all_places[:13], few)
