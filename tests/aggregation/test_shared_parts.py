"""FFA, RoLoRA and FedSA: what is trained, sent and kept, and that averaging one factor is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.aggregation import fedit, fedsa, ffa, hetlora, rolora
from fedjax_lora.core.exchange import Live
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Scope
from oracles.sparsifier_oracle import LAYERS, WIDTHS, product, random_adapters, rank_mask, stack, trained_from
from oracles.uploads import uploads

START = random_adapters(0)
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
SCALE = jnp.float32(2.0)
KEY = jax.random.key(0)
CONTEXT = Context(num_clients=4, cohort_size=4)
METHODS = {
    "ffa": (ffa.make(ffa.FfaConfig(), CONTEXT), 0, ("b", "head")),
    "rolora, even": (rolora.make(rolora.RoLoraConfig(), CONTEXT), 0, ("b", "head")),
    "rolora, odd": (rolora.make(rolora.RoLoraConfig(), CONTEXT), 1, ("a", "head")),
    "fedsa": (fedsa.make(fedsa.FedSaConfig(), CONTEXT), 0, ("a",)),
}


def cohort(live: Live):
    """Four clients' adapters, equal to the broadcast outside of what is live, and their uploads in full."""
    scope = Scope(jnp.asarray(rank_mask()), *map(jnp.float32, live))
    trained = stack([scope.select(trained_from(START, seed), START) for seed in (1, 2, 3, 4)])
    return trained, uploads(START, trained, rank_mask(), live)


@pytest.mark.parametrize(("aggregator", "number", "parts"), METHODS.values(), ids=METHODS)
def test_average_of_the_sent_parts_equals_loop_and_the_rest_stays(aggregator, number, parts):
    """Oracle: a NumPy loop over clients; what is sent is the parts alone."""
    live = aggregator.traffic(jnp.int32(number), True).sent
    assert [name for name, value in live._asdict().items() if value] == list(parts)
    trained, received = cohort(live)
    found = jax.jit(aggregator.aggregate)(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY).adapters

    def expected(part, leaf, before):
        if part not in parts:
            return before
        return sum(p * np.float64(leaf[k]) for k, p in enumerate(WEIGHTS))

    for name, f in found.modules.items():
        for part in ("a", "b"):
            mean = expected(part, getattr(trained.modules[name], part), getattr(START.modules[name], part))
            np.testing.assert_allclose(getattr(f, part), mean, rtol=1e-5, atol=1e-6)
    for name, leaf in found.head.items():
        mean = expected("head", trained.head[name], START.head[name])
        np.testing.assert_allclose(leaf, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("aggregator", "number", "parts"), METHODS.values(), ids=METHODS)
def test_averaging_one_factor_is_exact(aggregator, number, parts):
    """Explicit matrices: the server's product is the average of the products; both error norms vanish."""
    del parts
    trained, received = cohort(aggregator.traffic(jnp.int32(number), True).sent)
    found = jax.jit(aggregator.aggregate)(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY)
    for name in WIDTHS:
        for layer in range(LAYERS):
            clients = [jax.tree.map(lambda x, k=k: x[k], trained.modules[name]) for k in range(4)]
            ideal = sum(p * product(f, layer) for p, f in zip(WEIGHTS, clients, strict=True))
            np.testing.assert_allclose(product(found.adapters.modules[name], layer), ideal, atol=2e-5)
    assert found.covariance_error == 0.0
    assert found.sparsification_error < 1e-4
    whole, all_received = cohort(Live())
    both = jax.jit(aggregator.aggregate)(START, whole, all_received, jnp.float32(WEIGHTS), SCALE, KEY)
    assert both.covariance_error > 1.0  # both factors at once are not exact: the norm above can be other than 0


def test_what_is_trained_by_the_papers():
    """The table of the three papers."""
    one_b, one_a = Live(a=0.0), Live(b=0.0)
    even, odd = jnp.int32(4), jnp.int32(5)
    makes = {name: METHODS[name][0] for name in METHODS}
    assert makes["ffa"].trains(even) == makes["ffa"].trains(odd) == one_b
    assert tuple(map(float, makes["rolora, odd"].trains(even))) == one_b
    assert tuple(map(float, makes["rolora, odd"].trains(odd))) == one_a
    assert makes["fedsa"].trains(even) == Live()
    assert [makes[name].personal for name in makes] == [(), (), (), ("b", "head")]


@pytest.mark.parametrize("module", [fedit, ffa, rolora, fedsa, hetlora])
def test_config_names_field_and_value(module):
    """The message itself."""
    config = next(getattr(module, name) for name in vars(module) if name.lower() == f"{_name(module)}config")
    with pytest.raises(ValueError, match=f"name must be '{_name(module)}', got 'fedavg'"):
        config(name="fedavg")


def _name(module):
    return module.__name__.rpartition(".")[2]


def test_fedit_of_different_ranks_averages_a_component_over_those_who_own_it():
    """Oracle: a NumPy loop; client k has its first `ranks[k]` components, nobody the last."""
    ranks = [1, 3, 5, 2]
    trained = stack([trained_from(START, seed, rank=r) for seed, r in zip((1, 2, 3, 4), ranks, strict=True)])
    received = uploads(START, trained, np.stack([rank_mask(r) for r in ranks]))
    aggregate = jax.jit(fedit.make(fedit.FedItConfig(), CONTEXT).aggregate)
    found = aggregate(START, trained, received, jnp.float32(WEIGHTS), SCALE, KEY).adapters
    for name, f in found.modules.items():
        for i in range(6):
            owners = [k for k in range(4) if i < ranks[k]]
            total = sum(WEIGHTS[k] for k in owners)
            for part, at in (("a", np.s_[:, :, i]), ("b", np.s_[:, i])):
                mine = np.asarray(getattr(trained.modules[name], part), np.float64)
                mean = sum(WEIGHTS[k] / total * mine[k][at] for k in owners)
                expected = mean if owners else np.asarray(getattr(START.modules[name], part))[at]
                np.testing.assert_allclose(np.asarray(getattr(f, part))[at], expected, rtol=1e-5, atol=1e-6)
