"""Factors: their start, masks over ranks, and what a configuration refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import lora
from fedjax_lora.core.types import Adapters, Factors

TARGETS = {"query": (12, 12), "up": (12, 20), "down": (20, 12)}


def random_adapters(key=0, max_rank=6, num_layers=3) -> Adapters:
    modules = lora.init(jax.random.key(key), TARGETS, num_layers, max_rank)
    leaves, tree = jax.tree.flatten(modules)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    modules = jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    return Adapters(modules=modules, head={"w": jnp.ones((12, 2))})


def test_init_columns_are_orthogonal_of_the_asked_length_closed_form():
    modules = lora.init(jax.random.key(0), TARGETS, 3, 6, init_scale=0.5)
    for name, (n_in, n_out) in TARGETS.items():
        a, b = modules[name].a, modules[name].b
        assert a.shape == (3, n_in, 6) and b.shape == (3, 6, n_out)
        assert a.dtype == b.dtype == jnp.float32
        gram = jnp.einsum("lir,lis->lrs", a, a)
        np.testing.assert_allclose(gram, np.broadcast_to(0.25 * np.eye(6), (3, 6, 6)), atol=1e-6)
        np.testing.assert_array_equal(b, 0)


def test_init_of_a_module_does_not_depend_on_the_others_invariance():
    alone = lora.init(jax.random.key(0), {"up": TARGETS["up"]}, 3, 6)["up"].a
    np.testing.assert_array_equal(alone, lora.init(jax.random.key(0), TARGETS, 3, 6)["up"].a)


def test_init_differs_between_layers_modules_and_keys():
    modules = lora.init(jax.random.key(0), {"query": (12, 12), "key": (12, 12)}, 2, 6)
    other = lora.init(jax.random.key(1), {"query": (12, 12)}, 2, 6)
    columns = np.concatenate([modules["query"].a, modules["key"].a, other["query"].a])
    for i in range(len(columns)):
        for j in range(i):
            assert np.abs(columns[i] - columns[j]).max() > 0.1


def test_init_refuses_a_rank_wider_than_a_module():
    with pytest.raises(ValueError, match=r"^lora.max_rank must be at most 12, .*, got 13"):
        lora.init(jax.random.key(0), TARGETS, 1, 13)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_rank_mask_numpy_loop_also_traced(rank):
    expected = [1.0 if i < rank else 0.0 for i in range(6)]
    np.testing.assert_array_equal(jax.jit(lora.rank_mask, static_argnums=1)(jnp.float32(rank), 6), expected)


def test_effective_product_is_the_scaled_product_of_the_kept_components_numpy_loop():
    adapters, kept = random_adapters(), 4
    folded = lora.effective(adapters, lora.rank_mask(kept, 6), 2.5)
    for name, factors in adapters.modules.items():
        a, b = np.asarray(factors.a), np.asarray(factors.b)
        for layer in range(3):
            expected = sum(2.5 * np.outer(a[layer, :, i], b[layer, i]) for i in range(kept))
            got = np.asarray(folded.modules[name].a[layer]) @ np.asarray(folded.modules[name].b[layer])
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(folded.head["w"], adapters.head["w"])


def test_masked_components_have_no_effect_and_no_gradient_invariance():
    adapters, mask = random_adapters(), lora.rank_mask(2, 6)
    x = jax.random.normal(jax.random.key(5), (7, 12))

    def output(adapters):
        factors = lora.effective(adapters, mask, 2.0).modules["up"]
        return ((x @ factors.a[1]) @ factors.b[1] ** 2).sum()

    other = random_adapters(key=9)
    mixed = jax.tree.map(lambda x, y: x, adapters, other)
    for name, factors in adapters.modules.items():
        junk = other.modules[name]
        mixed.modules[name] = Factors(
            a=jnp.where(mask > 0, factors.a, junk.a), b=jnp.where(mask[:, None] > 0, factors.b, junk.b)
        )
    assert output(adapters) == output(mixed)
    gradient = jax.grad(output)(adapters).modules["up"]
    np.testing.assert_array_equal(gradient.a[:, :, 2:], 0)
    np.testing.assert_array_equal(gradient.b[:, 2:], 0)
    assert jnp.abs(gradient.a[1, :, :2]).min() > 0 and jnp.abs(gradient.b[1, :2]).min() > 0


def test_merge_adds_each_product_to_its_own_columns_numpy_loop():
    targets = {"query": (5, 4), "key": (5, 2), "value": (5, 3), "down": (7, 5)}
    key = jax.random.key(0)
    base = {
        "embeddings": {"word": jnp.ones((2, 5))},
        "layers": {
            "query_key_value": {"w": jax.random.normal(key, (2, 5, 9)), "b": jnp.ones((2, 9))},
            "down": {"w": jax.random.normal(key, (2, 7, 5)), "b": jnp.ones((2, 5))},
            "norm_mlp": {"scale": jnp.ones((2, 5))},
        },
    }
    modules = {
        name: Factors(a=jax.random.normal(key, (2, n_in, 3)), b=jax.random.normal(key, (2, 3, n_out)))
        for name, (n_in, n_out) in targets.items()
        if name != "query"
    }
    merged = lora.merge(base, Adapters(modules=modules, head={}), targets)
    expected = {group: np.array(base["layers"][group]["w"]) for group in ("query_key_value", "down")}
    for layer in range(2):
        for name, group, columns in (
            ("key", "query_key_value", slice(4, 6)),
            ("value", "query_key_value", slice(6, 9)),
            ("down", "down", slice(0, 5)),
        ):
            product = np.asarray(modules[name].a[layer]) @ np.asarray(modules[name].b[layer])
            expected[group][layer, :, columns] += product
    for group, w in expected.items():
        np.testing.assert_allclose(merged["layers"][group]["w"], w, rtol=1e-5, atol=1e-6)
    rest = jax.tree.map(lambda x, y: bool((x == y).all()), {**base, "layers": {}}, {**merged, "layers": {}})
    assert all(jax.tree.leaves(rest))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_rank": 0}, "max_rank must be at least 1, got 0"),
        ({"max_rank": 4, "rank": 5}, "rank must be from 1 to max_rank = 4, got 5"),
        ({"rank": 0}, "rank must be from 1 to max_rank = 8, got 0"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"targets": ()}, r"targets must name at least one module, got \(\)"),
        ({"targets": ("query", "query")}, "targets must name each module once"),
        ({"init_scale": -1.0}, "init_scale must be positive and finite, got -1.0"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.LoraConfig(**fields)
