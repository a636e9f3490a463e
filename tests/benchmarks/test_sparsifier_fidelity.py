"""What the fidelity benchmarks compute, against the full products in NumPy."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Dataset, Factors
from fedjax_lora.sparsifiers import dense, soft, top_k
from oracles import sparsifier_oracle as oracle
from oracles.contexts import context, offered_bits, upload
from oracles.sparsifier_oracle import RANK, random_adapters, scope, trained_from

START = random_adapters(0)
COHORT = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained_from(START, seed) for seed in (1, 2, 3)))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("sparsifier_fidelity")


@pytest.fixture
def premise(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("soft_premise")


def products(adapters):
    """Module name -> the full products, `[..., L, n_in, n_out]`, float64."""
    return {name: np.float64(f.a) @ np.float64(f.b) for name, f in adapters.modules.items()}


def uploads(method, kept):
    """What each client of the cohort sends, in full."""
    return jax.vmap(upload(method), (None, 0, None, None, None, None))(
        START, COHORT, (), jnp.float32(kept), scope(), jax.random.key(0)
    )


def changes(cohort):
    before = products(START)
    return {name: after - before[name] for name, after in products(cohort).items()}


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_best_shares_are_those_of_the_full_products(fidelity, kept):
    """The eigenvalues of every client's Gram matrix, and projections on its eigenvectors, client by client."""
    of_clients, cut_off, whole = [], {}, {}
    for k in range(3):
        best = total = 0.0
        for name, change in changes(COHORT).items():
            for layer, matrix in enumerate(change[k]):
                energies, vectors = np.linalg.eigh(matrix.T @ matrix)
                small = vectors[:, : max(vectors.shape[1] - kept, 0)]
                best, total = best + energies[-kept:].sum(), total + energies.sum()
                cut_off[name, layer] = cut_off.get((name, layer), 0.0) + matrix @ small @ small.T / 3
                whole[name, layer] = whole.get((name, layer), 0.0) + matrix / 3
        of_clients.append(best / total)
    lost = sum(np.sum(x**2) for x in cut_off.values()) / sum(np.sum(x**2) for x in whole.values())
    found = fidelity.best_shares(START, COHORT, kept)
    assert found == pytest.approx((np.mean(of_clients), 1 - lost), rel=1e-6, abs=1e-9)


def test_kept_within_is_the_last_that_fits(fidelity):
    """The next more costs more: k + 1 components, or one step of single values; a bit less buys one component less."""
    used = scope()
    by_rank, by_value = (m.make(c, context(START)) for m, c in ((soft, soft.SoftConfig()), (top_k, top_k.TopKConfig())))
    price = offered_bits(by_rank, START, START, used)
    for k in (1, 2, 4):
        assert fidelity.kept_within(by_rank, START, used, price[k]) == k
        assert fidelity.kept_within(by_rank, START, used, price[k] - 1) == (k - 1 or None)
    found, step = fidelity.kept_within(by_value, START, used, price[2]), RANK / 10_000
    send = jax.jit(upload(by_value))
    costs = [int(send(START, START, (), k, used, jax.random.key(0)).bits.exact()) for k in (found, found + step)]
    assert costs[0] <= price[2] < costs[1]
    assert fidelity.kept_within(by_value, START, used, 1) is None


@pytest.mark.parametrize("send", ["change", "factors"])
def test_kept_shares_are_those_of_the_full_products(fidelity, send):
    """NumPy, from products before and after and a loop that averages each component over those who sent it."""
    key, used, kept = jax.random.key(0), scope(), jnp.float32(RANK / 2)
    method = soft.make(soft.SoftConfig(send=send), context(START))
    found = fidelity.kept_shares(method, START, COHORT, kept, used, key)
    sent = uploads(method, kept)
    arrived, change = products(sent.adapters), changes(COHORT)
    after = products(COHORT)
    lost = sum(((after[n] - arrived[n]) ** 2).sum((1, 2, 3)) for n in after)
    whole = sum((change[n] ** 2).sum((1, 2, 3)) for n in after)
    assert float(found[0]) == pytest.approx(1 - np.mean(lost / whole), abs=1e-5)
    assert float(found[1]) == pytest.approx(_average_share(sent), abs=1e-5)
    if send == "change":  # senders differ, so that it matters who counts
        assert len({mask.tobytes() for mask in np.asarray(sent.counted["query"])}) > 1


def _average_share(sent):
    """Share of the mean change of the products that the averages of the factors have."""
    counted = {name: np.asarray(mask) for name, mask in sent.counted.items()}
    averages, _ = oracle.fedit(START, sent.adapters, counted, np.full(3, 1 / 3))
    before, lost, whole = products(START), 0.0, 0.0
    for name, (a, b) in averages.items():
        ideal = products(COHORT)[name].mean(0)
        lost, whole = lost + np.sum((ideal - a @ b) ** 2), whole + np.sum((ideal - before[name]) ** 2)
    return 1 - lost / whole


def test_dense_loses_of_the_average_alone(fidelity):
    """Closed form: all of each client's change arrives, and of the average what the loop's averages have."""
    method = dense.make(dense.DenseConfig(), context(START))
    clients, average, _ = fidelity.kept_shares(method, START, COHORT, jnp.float32(RANK), scope(), jax.random.key(0))
    sent = uploads(method, RANK)
    assert float(clients) == pytest.approx(1.0, abs=1e-6)
    assert float(average) == pytest.approx(_average_share(sent), abs=1e-5)
    assert average < 0.99


def test_held_out_examples_are_a_fifth_that_nobody_trains_on(premise):
    """Counting, with examples that are their own row numbers."""
    index = jnp.array([[4, 1, 2, 7, 9, 0], [3, 5, 3, 3, 3, 3]], jnp.int32)
    rows = jnp.arange(10)
    data = Dataset(train={"label": rows}, index=index, count=jnp.array([5, 2], jnp.int32), test={"label": rows})
    held = premise.hold_out(data)
    assert held.count.tolist() == [4, 2]
    assert held.test["label"].tolist() == [9]


def test_rotation_keeps_the_product_and_makes_components_its_singular_triples(premise):
    """NumPy's products and singular values in float64; b = 0 at the start leaves a that can be trained."""
    turned = premise.rotate(START)
    for name, expected in products(START).items():
        np.testing.assert_allclose(products(turned)[name], expected, atol=2e-5)
        a, b = (np.float64(x) for x in (turned.modules[name].a, turned.modules[name].b))
        lengths = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
        values = np.linalg.svd(expected, compute_uv=False)[..., : lengths.shape[-1]]
        np.testing.assert_allclose(lengths[..., : values.shape[-1]], values, rtol=1e-4, atol=1e-4)
        for gram in (np.swapaxes(a, -1, -2) @ a, b @ np.swapaxes(b, -1, -2)):
            np.testing.assert_allclose(gram * (1 - np.eye(gram.shape[-1])), 0, atol=1e-3)
    fresh = Adapters({name: Factors(a=f.a, b=jnp.zeros_like(f.b)) for name, f in START.modules.items()}, START.head)
    for name, f in premise.rotate(fresh).modules.items():
        assert not f.b.any()
        before = np.mean(np.sum(np.float64(START.modules[name].a) ** 2, -2), -1)
        np.testing.assert_allclose(np.sum(np.float64(f.a) ** 2, -2), np.tile(before[:, None], f.a.shape[-1]), rtol=1e-4)
