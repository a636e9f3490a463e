"""Factors: their start, masks over ranks, and what a configuration refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import lora
from fedjax_lora.core.learning import Site
from fedjax_lora.core.methods import Context
from fedjax_lora.core.numbers import fill, split
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops import primitives

SITES = {"query": Site("query", 0, 12, 12), "up": Site("up", 0, 12, 20), "down": Site("down", 0, 20, 12)}


def random_adapters(key=0, max_rank=6, num_layers=3) -> Adapters:
    modules = lora.init(jax.random.key(key), SITES, num_layers, max_rank)
    leaves, tree = jax.tree.flatten(modules)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    modules = jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    return Adapters(modules=modules, head={"w": jnp.ones((12, 2))})


def test_init_columns_are_orthogonal_of_the_asked_length_closed_form():
    modules = lora.init(jax.random.key(0), SITES, 3, 6, init_scale=0.5)
    for name, site in SITES.items():
        a, b = modules[name].a, modules[name].b
        assert a.shape == (3, site.n_in, 6) and b.shape == (3, 6, site.n_out)
        assert a.dtype == b.dtype == jnp.float32
        gram = jnp.einsum("lir,lis->lrs", a, a)
        np.testing.assert_allclose(gram, np.broadcast_to(0.25 * np.eye(6), (3, 6, 6)), atol=1e-6)
        np.testing.assert_array_equal(b, 0)


def test_init_of_a_module_does_not_depend_on_the_others_invariance():
    alone = lora.init(jax.random.key(0), {"up": SITES["up"]}, 3, 6)["up"].a
    np.testing.assert_array_equal(alone, lora.init(jax.random.key(0), SITES, 3, 6)["up"].a)


def test_init_differs_between_layers_modules_and_keys():
    modules = lora.init(jax.random.key(0), {"query": SITES["query"], "key": SITES["query"]}, 2, 6)
    other = lora.init(jax.random.key(1), {"query": SITES["query"]}, 2, 6)
    columns = np.concatenate([modules["query"].a, modules["key"].a, other["query"].a])
    for i in range(len(columns)):
        for j in range(i):
            assert np.abs(columns[i] - columns[j]).max() > 0.1


def test_init_refuses_a_rank_wider_than_a_module():
    with pytest.raises(ValueError, match=r"^lora.max_rank must be at most 12, .*, got 13"):
        lora.init(jax.random.key(0), SITES, 1, 13)


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


SIDE_BY_SIDE = {
    "q_proj": Site("qkv", 0, 5, 4),
    "k_proj": Site("qkv", 4, 5, 2),
    "v_proj": Site("qkv", 6, 5, 3),
    "down_proj": Site("down", 0, 7, 5),
}
"""Names that share parts with each other, and none with the matrices that they lie in."""


def side_by_side_base() -> dict:
    key = jax.random.key(0)
    return {
        "embeddings": {"word": jnp.ones((2, 5))},
        "layers": {
            "qkv": {"w": jax.random.normal(key, (2, 5, 9)), "b": jnp.ones((2, 9))},
            "down": {"w": jax.random.normal(key, (2, 7, 5)), "b": jnp.ones((2, 5))},
            "norm_mlp": {"scale": jnp.ones((2, 5))},
        },
    }


def side_by_side_modules(*names) -> dict:
    modules = {}
    for name in names:
        key, site = jax.random.key(len(name) + ord(name[0])), SIDE_BY_SIDE[name]
        modules[name] = Factors(
            a=jax.random.normal(key, (2, site.n_in, 3)), b=jax.random.normal(key, (2, 3, site.n_out))
        )
    return modules


def test_merge_adds_each_product_to_its_own_columns_numpy_loop():
    base, modules = side_by_side_base(), side_by_side_modules("k_proj", "v_proj", "down_proj")
    merged = lora.merge(base, Adapters(modules=modules, head={}), SIDE_BY_SIDE)
    expected = {group: np.array(base["layers"][group]["w"]) for group in ("qkv", "down")}
    for layer in range(2):
        for name, group, columns in (
            ("k_proj", "qkv", slice(4, 6)),
            ("v_proj", "qkv", slice(6, 9)),
            ("down_proj", "down", slice(0, 5)),
        ):
            product = np.asarray(modules[name].a[layer]) @ np.asarray(modules[name].b[layer])
            expected[group][layer, :, columns] += product
    for group, w in expected.items():
        np.testing.assert_allclose(merged["layers"][group]["w"], w, rtol=1e-5, atol=1e-6)
        assert np.abs(w - base["layers"][group]["w"]).max() > 0.1
    rest = jax.tree.map(lambda x, y: bool((x == y).all()), {**base, "layers": {}}, {**merged, "layers": {}})
    assert all(jax.tree.leaves(rest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": jnp.ones((2, 5, 9))}, "changes must be of the model's sites, q_proj, .*, got 'qkv'"),
        ({"q_proj_v_proj": jnp.ones((2, 5, 7))}, "changes must be of the model's sites, .*, got 'q_proj_v_proj'"),
        ({"k_proj": jnp.ones((2, 5, 1))}, r"the change of k_proj must be of its site's shape, \(2, 5, 2\), got"),
        ({"k_proj": jnp.ones((1, 5, 2))}, r"the change of k_proj must be of its site's shape, \(2, 5, 2\), got"),
    ],
)
def test_a_change_without_a_site_or_of_another_shape_is_an_error_and_never_silence(changes, message):
    with pytest.raises(ValueError, match=message):
        lora.add_to_base(side_by_side_base(), changes, SIDE_BY_SIDE)
    outside = {"q_proj": Site("qkv", 7, 5, 4)}
    with pytest.raises(ValueError, match="the change of q_proj must be of its site's shape"):
        lora.add_to_base(side_by_side_base(), {"q_proj": jnp.ones((2, 5, 4))}, outside)


@pytest.mark.parametrize("names", [(), ("k_proj",), ("q_proj", "v_proj"), ("v_proj", "q_proj", "k_proj")])
def test_project_adds_each_product_in_its_columns_numpy_loop_and_gradient_of_the_plain_products(names):
    w, x = side_by_side_base()["layers"]["qkv"]["w"][1], jax.random.normal(jax.random.key(8), (4, 3, 5))
    adapters = {
        name: (SIDE_BY_SIDE[name].first, jax.tree.map(lambda leaf: leaf[1], factors))
        for name, factors in side_by_side_modules(*names).items()
    }
    expected = np.asarray(x) @ np.asarray(w)
    for first, factors in adapters.values():
        columns = slice(first, first + factors.b.shape[1])
        expected[..., columns] += np.asarray(x) @ np.asarray(factors.a) @ np.asarray(factors.b)
    np.testing.assert_allclose(lora.project(x, w, adapters), expected, rtol=1e-5, atol=1e-5)
    packed = lora.project(x, primitives.pack(w.astype(jnp.bfloat16)), adapters)
    np.testing.assert_allclose(packed, expected, rtol=0.1, atol=0.3)

    leaves = {name: factors for name, (_, factors) in adapters.items()}

    def plain(x, leaves):
        y = x @ w
        for name, factors in leaves.items():
            first = SIDE_BY_SIDE[name].first
            y = y.at[..., first : first + factors.b.shape[1]].add((x @ factors.a) @ factors.b)
        return jnp.sin(y).sum()

    def fused(x, leaves):
        placed = {name: (SIDE_BY_SIDE[name].first, factors) for name, factors in leaves.items()}
        return jnp.sin(lora.project(x, w, placed)).sum()

    got, wanted = (jax.grad(function, argnums=(0, 1))(x, leaves) for function in (fused, plain))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4), got, wanted)


def test_the_record_merges_what_it_projects_invariance():
    """`x @ (w + merged) = project(x, w, adapters)` of one matrix, by the record's own functions."""
    adapter = lora.make(lora.LoraAdapterOptions(), Context(num_clients=1, cohort_size=1))
    sites = {name: site for name, site in SIDE_BY_SIDE.items() if site.group == "qkv"}
    start = adapter.init(jax.random.key(2), sites, 2, 4, 0.5)
    assert all(not leaves.any() for leaves in adapter.merge(start).values())
    np.testing.assert_allclose(jnp.linalg.norm(start["k_proj"].a, axis=1), 0.5, rtol=1e-5)
    modules = {name: Factors(a=f.a, b=jnp.ones_like(f.b)) for name, f in start.items()}
    used = adapter.effective(modules, lora.rank_mask(3, 4), 2.0)
    base, x = side_by_side_base(), jax.random.normal(jax.random.key(8), (4, 5))
    merged = lora.add_to_base(base, adapter.merge(used), SIDE_BY_SIDE)["layers"]["qkv"]["w"][0]
    placed = {name: (sites[name].first, jax.tree.map(lambda leaf: leaf[0], f)) for name, f in used.items()}
    got = adapter.project(x, base["layers"]["qkv"]["w"][0], placed)
    np.testing.assert_allclose(got, x @ merged, rtol=1e-4, atol=1e-5)


def test_numbers_of_the_section_are_traced_and_shapes_are_structure_round_trip():
    config = lora.LoraConfig(rank=4, alpha=3.0, init_scale=0.5, client_ranks=(4, 2))
    structure, numbers = split(config, "lora.")
    assert sorted(numbers) == ["lora.alpha", "lora.client_ranks", "lora.init_scale", "lora.rank"]
    assert (structure.max_rank, structure.targets) == (8, ("query", "value"))
    assert hash(structure) == hash(split(lora.LoraConfig(rank=1, client_ranks=(1, 1)))[0])
    assert structure != split(lora.LoraConfig())[0]  # () is structure
    filled = fill(structure, numbers, "lora.")
    assert filled.rank == 4 and filled.alpha == 3.0 and list(filled.client_ranks) == [4, 2]


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
