"""Ranks and scales of single layers: what a pattern names, and what aggregators make of layers that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import layer_ranks, lora
from fedjax_lora.adapters.layer_ranks import LayerRanks
from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.adapters.patterns import matching_key
from fedjax_lora.aggregation import fedex, fedit, flexlora, flora, hetlora, lora_fair
from fedjax_lora.aggregation.products import product_bits
from fedjax_lora.config.experiment import ConfigError, dump, load_config
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.learning import Site
from fedjax_lora.core.mapping import Mapped
from fedjax_lora.core.types import Adapters, Factors
from oracles.contexts import context
from oracles.sparsifier_oracle import LAYERS, MAX_RANK, WIDTHS, product, random_adapters, stack

SITES = {
    "query": Site("query", 0, 12, 20, "encoder.layer.{layer}.attention.self.query"),
    "output": Site("output", 0, 13, 5, "encoder.layer.{layer}.attention.output.dense"),
    "down": Site("down", 0, 13, 5, "encoder.layer.{layer}.output.dense"),
}
NAMES = [(name, layer, site.source.format(layer=layer)) for name, site in SITES.items() for layer in range(12)]
PATTERNS = [
    {"query": 2},
    {"layer.1.attention.self.query": 2, "query": 3},
    {"query": 3, "layer.1.attention.self.query": 2},
    {"1.output.dense": 2, "output.dense": 3, "dense": 4},
    {r"encoder\.layer\.(1|2)\..*": 2},
    {r".*\.[0-4]\.attention.*": 2, "encoder.layer.7.output.dense": 5},
    {"output.dense|key": 2},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_a_pattern_names_what_it_does_in_peft(pattern):
    """Oracle: PEFT's own function, name by name."""
    other = pytest.importorskip("peft.utils.other")
    config = LoraConfig(max_rank=6, rank=6, alpha=9.0, rank_pattern=Mapped(pattern), alpha_pattern=Mapped(pattern))
    found = layer_ranks.resolve(config, SITES, 12)
    seen = set()
    for name, layer, path in NAMES:
        key = other.get_pattern_key(pattern.keys(), path)
        own = pattern.get(key)
        assert matching_key(pattern, path) == (key if key in pattern else None)
        assert found.ranks[name][layer] == (own or 6)
        np.testing.assert_allclose(found.shares[name][layer], ((own or 9.0) / (own or 6)) / (9.0 / 6), rtol=1e-12)
        seen.add(own)
    assert len(seen) > 1


def test_numbers_of_layers_without_a_pattern_are_traced():
    """Oracle: the same of concrete numbers."""
    pattern = Mapped({"query": 2})

    def of(rank, alpha):
        config = LoraConfig(max_rank=8, rank_pattern=pattern)
        object.__setattr__(config, "rank", rank)
        object.__setattr__(config, "alpha", alpha)
        found = layer_ranks.resolve(config, SITES, 3)
        return found, layer_ranks.structural_rank(found, rank)

    for rank in (1, 5):
        (traced, most), (concrete, expected) = jax.jit(of)(jnp.float32(rank), jnp.float32(6)), of(rank, 6.0)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), traced, concrete)
        assert most == expected == max(2, rank)


def test_the_order_of_a_pattern_tells_configurations_apart(tmp_path):
    """Of two that match, the first counts: programs are shared by equality. Oracle: what was written, read again."""
    one, two = (load_config(None, [f"lora.rank_pattern={text}"]) for text in ("{b: 1, a: 2}", "{a: 2, b: 1}"))
    assert one != two
    for number, config in enumerate((one, two)):
        (tmp_path / f"{number}.yaml").write_text(dump(config))
        assert load_config(tmp_path / f"{number}.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("{rank_pattern: {query: 0}}", "lora.rank_pattern must have ranks from 1 to max_rank = 8, got 0 for 'query'"),
        ("{rank_pattern: {query: 9}}", "lora.rank_pattern must have ranks from 1 to max_rank = 8, got 9 for 'query'"),
        ("{rank_pattern: {query: 2.5}}", "lora.rank_pattern must have ranks from 1 to max_rank = 8, got 2.5"),
        ("{rank_pattern: {query: true}}", "lora.rank_pattern must have ranks from 1 to max_rank = 8, got True"),
        ("{rank_pattern: {'(': 2}}", "lora.rank_pattern must have names or regular expressions as its keys, got '('"),
        ("{alpha_pattern: {query: 0}}", "lora.alpha_pattern must have positive and finite numbers, got 0 for 'query'"),
        ("{alpha_pattern: {query: -1}}", "lora.alpha_pattern must have positive and finite numbers, got -1"),
        ("{alpha_pattern: {query: much}}", "lora.alpha_pattern must have positive and finite numbers, got 'much'"),
        ("{alpha_pattern: {query: .inf}}", "lora.alpha_pattern must have positive and finite numbers, got inf"),
        ("{rank_pattern: 4}", "lora.rank_pattern must be a mapping of keys, got 4"),
    ],
)
def test_what_a_pattern_cannot_hold_is_one_line(override, expected):
    """The message names the field, what is allowed, and what it got."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"lora={override}"])
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_module_is_refused(field):
    """The message names the field, the nearest name, and what it got; `dense` alone is the end of two."""
    config = LoraConfig(**{field: Mapped({"dense": 2, "1.attention.self.kwery": 2})})
    with pytest.raises(ValueError) as caught:
        layer_ranks.resolve(config, SITES, 2)
    assert str(caught.value) == (
        f"lora.{field} must name modules of lora.targets, such as encoder.layer.1.attention.self.query, got "
        "'1.attention.self.kwery'"
    )


RANKS = {"query": np.array([2.0, 6.0]), "value": np.array([4.0, 1.0])}
SHARES = {"query": np.array([1.5, 0.25]), "value": np.array([1.0, 3.0])}
UNEVEN = LayerRanks(RANKS, SHARES)
WEIGHTS = np.array([0.5, 0.0, 0.2, 0.3])
SCALE = 2.0
CONTEXT = context()


def test_an_adapter_begins_without_the_components_that_a_layer_lacks():
    """Oracle: the factors of even ranks, sliced; what is computed is PEFT's, which has alpha / r for each layer."""
    whole = lora.METHOD.make(lora.LoraAdapterOptions(), CONTEXT)
    sites = {name: Site(name, 0, *widths) for name, widths in WIDTHS.items()}
    even = whole.init(jax.random.key(0), sites, LAYERS, 5, 2.0)
    with pytest.raises(ValueError, match=r"lora.rank_pattern must be absent where adapters are no factors, got .*int"):
        UNEVEN.masked({"query": 1})
    own = UNEVEN.adapter(whole)
    found, modules = own.init(jax.random.key(0), sites, LAYERS, 5, 2.0), random_adapters(1).modules
    mask = np.ones(MAX_RANK, np.float32)
    computed = whole.merge(own.effective(modules, mask, SCALE))
    for name, factors in found.items():
        for layer, rank in enumerate(RANKS[name].astype(int)):
            np.testing.assert_array_equal(factors.a[layer, :, :rank], even[name].a[layer, :, :rank])
            assert not np.any(factors.a[layer, :, rank:]) and not np.any(factors.b)
            expected = SCALE * SHARES[name][layer] * product(modules[name], layer, range(rank))
            np.testing.assert_allclose(computed[name][layer], expected, atol=1e-4)


METHODS = {
    "fedit": fedit.make(fedit.FedItConfig(), CONTEXT),
    "hetlora": hetlora.make(hetlora.HetLoraConfig(), CONTEXT),
    "fedex": fedex.make(fedex.FedExConfig(), CONTEXT),
    "flora": flora.make(flora.FloraConfig(), CONTEXT),
    "flexlora": flexlora.make(flexlora.FlexLoraConfig(), CONTEXT),
    "lora_fair": lora_fair.make(lora_fair.LoraFairConfig(regularisation=0.3), CONTEXT),
}


def sliced(adapters, name, layer, rank):
    """One layer of one module alone, in its own rank; leaves may have a leading axis of clients."""
    f = adapters.modules[name]
    one = Factors(a=f.a[..., layer : layer + 1, :, :rank], b=f.b[..., layer : layer + 1, :rank, :])
    return Adapters(modules={name: one}, head=adapters.head)


def cohort(seed):
    """Clients that hold the components of the layers, of which each keeps some."""
    clients = [
        Adapters(modules=UNEVEN.masked(one.modules), head=one.head)
        for one in map(random_adapters, range(seed, seed + 4))
    ]
    return stack(clients)


@pytest.mark.parametrize("name", METHODS)
def test_an_aggregator_treats_each_layer_in_its_own_rank_and_scale(name):
    """Oracle: the method on each layer alone, of as many components as it has, at its scale."""
    start, trained, received = (cohort(seed) for seed in (0, 10, 20))
    start = jax.tree.map(lambda leaf: leaf[0], start)
    shown = np.random.default_rng(3).random((4, LAYERS, MAX_RANK)) < 0.7
    counted = {n: jnp.float32(shown & (np.arange(MAX_RANK) < RANKS[n][:, None])) for n in WIDTHS}
    key, weights = jax.random.key(0), jnp.float32(WEIGHTS)
    scales = {n: jnp.float32(SCALE * share) for n, share in SHARES.items()}
    found = jax.jit(METHODS[name].aggregate)(start, trained, Received(received, counted), weights, scales, key)
    errors = np.zeros(2)
    for module in WIDTHS:
        for layer, rank in enumerate(RANKS[module].astype(int)):
            own, arrived, held = (sliced(x, module, layer, rank) for x in (start, received, trained))
            of_layer = Received(arrived, {module: counted[module][:, layer : layer + 1, :rank]})
            scale = scales[module][layer]
            alone = jax.jit(METHODS[name].aggregate)(own, held, of_layer, weights, scale, key)
            ours, theirs = found.adapters.modules[module], alone.adapters.modules[module]
            assert not np.any(ours.a[layer, :, rank:]) and not np.any(ours.b[layer, rank:])
            np.testing.assert_allclose(product(ours, layer), product(theirs, 0), atol=2e-5)
            if name != "flora":  # whose new a has b = 0
                own_a, alone_a = (np.abs(x) if name == "flexlora" else x for x in (ours.a[layer], theirs.a[0]))  # signs
                np.testing.assert_allclose(own_a[:, :rank], alone_a, atol=2e-5)
            if found.merged:
                np.testing.assert_allclose(found.merged[module][layer], alone.merged[module][0], atol=1e-4)
            errors += np.array([alone.sparsification_error, alone.covariance_error]) ** 2
    np.testing.assert_allclose(
        [found.sparsification_error, found.covariance_error], np.sqrt(errors), rtol=1e-4, atol=1e-4
    )


def test_what_is_merged_is_charged_by_the_ranks_of_the_layers():
    """Oracle: the smaller of the stack and the matrix, layer by layer."""
    like, clients = random_adapters(0), 2
    bits = sum(
        32 * min(n_in * n_out, int(rank) * clients * (n_in + n_out))
        for name, (n_in, n_out) in WIDTHS.items()
        for rank in RANKS[name]
    )
    ranks = {name: jnp.float32(of_module) for name, of_module in RANKS.items()}
    assert jax.jit(lambda ranks: product_bits(like, clients, ranks))(ranks).exact() == bits
    assert product_bits(like, None, ranks).exact() == 32 * LAYERS * sum(x * y for x, y in WIDTHS.values())
