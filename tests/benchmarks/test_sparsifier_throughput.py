"""The benchmark of sparsifiers at toy size: both sides against NumPy and each other, and its JSON's own arithmetic."""

import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.sparsifiers import dense, soft, soft_rotated, svd
from oracles.contexts import context
from oracles.sparsifier_oracle import RANK, random_adapters, scope, trained_from

KEPT = 2


@pytest.fixture
def side(benchmark):
    """The module of PyTorch's side, with its size."""
    module = benchmark("sparsifier_torch")
    return module, module.Size(clients=3, rank=5, width=7)


def changes(drawn):
    """`[C, R, n, n]` changes of all rank components, float64."""
    a0, b0, a, b = (np.asarray(x, np.float64) for x in drawn)
    return np.einsum("cnr,crm->crnm", a, b) - np.einsum("nr,rm->rnm", a0, b0)


def largest(values, count):
    """Sets of the indices of the `count` largest, row by row."""
    return [set(row) for row in np.argsort(values, -1)[:, -count:]]


def test_torch_takes_the_components_of_largest_change(side):
    """NumPy: Frobenius norms of explicit products."""
    pytest.importorskip("torch")
    module, size = side
    drawn = module.draw(size)
    sent_a, sent_b = module.calls(size, KEPT, 0)["topk of ranks"]()
    expected = largest(np.linalg.norm(changes(drawn), axis=(-2, -1)), KEPT)
    for client, taken in enumerate(expected):
        for rank in range(size.rank):
            a, b = (drawn.a[client] - drawn.a0)[:, rank], (drawn.b[client] - drawn.b0)[rank]
            np.testing.assert_allclose(sent_a[client, :, rank], a if rank in taken else 0 * a, rtol=1e-6)
            np.testing.assert_allclose(sent_b[client, rank], b if rank in taken else 0 * b, rtol=1e-6)


def test_torch_takes_the_largest_values_and_singular_triples(side):
    """NumPy: a sort of all values, and the SVD of the product."""
    pytest.importorskip("torch")
    module, size = side
    drawn, found = module.draw(size), module.calls(size, KEPT, size.clients)
    flat = np.concatenate([(drawn.a - drawn.a0).reshape(3, -1), (drawn.b - drawn.b0).reshape(3, -1)], 1)
    values, index = found["topk of values"]()
    assert [set(row.tolist()) for row in index] == largest(np.abs(flat), 2 * KEPT * size.width)
    np.testing.assert_array_equal(values, np.take_along_axis(flat, index.numpy(), 1))
    u, s, vt = np.linalg.svd(np.float64(drawn.a) @ np.float64(drawn.b))
    best = (u[:, :, :KEPT] * s[:, None, :KEPT]) @ vt[:, :KEPT]
    left, own, right = found["QR-based SVD"]()
    np.testing.assert_allclose((left * own[:, None]) @ right.mT, best, atol=1e-4)
    left, own, right = found["full SVD of the product"]()
    np.testing.assert_allclose((left * own[:, None]) @ right, best, atol=1e-4)


def test_soft_sends_what_torch_takes_and_its_bits_are_counted(benchmark, side):
    """PyTorch's masked changes; bits by hand: values of 32 bits, and a list of ranks of 3 bits each, or 5 of a map."""
    pytest.importorskip("torch")
    module, size = side
    programs = benchmark("sparsifier_programs")
    held = programs.cohort(module.draw(size))
    program = programs.message(programs.made(soft.METHOD, held.start, size.clients), held, KEPT)
    tails, sent, exact, bits = program.call()
    expected = module.calls(size, KEPT, 0)["topk of ranks"]()
    for part, theirs in zip((sent.modules["query"].a, sent.modules["query"].b), expected, strict=True):
        np.testing.assert_allclose(part[:, 0], theirs, rtol=1e-5, atol=1e-6)
    assert bits.tolist() == [KEPT * 2 * size.width * 32 + min(KEPT * 3, 5)] * size.clients
    assert exact == () and program.compile_s > 0
    energies = np.sort(np.linalg.norm(changes(module.draw(size)), axis=(-2, -1)) ** 2)[:, ::-1]
    np.testing.assert_allclose(tails[:, KEPT], energies[:, KEPT:].sum(-1), rtol=1e-4)


@pytest.mark.parametrize("name", ["thin SVD", "full SVD"])
def test_choices_are_singular_values_of_the_products(benchmark, side, name):
    """NumPy's SVD of the product, of the first clients alone."""
    module, size = side
    programs, drawn = benchmark("sparsifier_programs"), module.draw(size)
    found = programs.choice(programs.CHOICES[name], programs.cohort(drawn), 2).call()
    expected = np.linalg.svd(np.float64(drawn.a[:2]) @ np.float64(drawn.b[:2]), compute_uv=False)
    np.testing.assert_allclose(found[:, 0], expected[:, : size.rank], rtol=1e-4)


def test_sizes_above_half_of_the_memory_are_skipped_and_listed(benchmark, monkeypatch):
    """By hand: three copies of both factors."""
    module = benchmark("sparsifier_throughput")
    monkeypatch.setattr(module.common, "total_memory_bytes", lambda: 2 * 3 * 16 * 4 * 2 * 4 * 10)
    measured, skipped = module.sizes(Namespace(clients=[16, 17], ranks=[4], widths=[10]))
    assert [tuple(size) for size in measured] == [(16, 4, 10)]
    assert skipped == [{"clients": 17, "rank": 4, "width": 10, "bytes": 16320, "limit_bytes": 15360}]


def test_checks_say_what_was_asked_and_found(benchmark):
    """By hand, from rates."""
    module = benchmark("sparsifier_throughput")

    def rates(**of):
        return {name: {"clients_per_s": rate} for name, rate in of.items()}

    methods = rates(soft=600.0, soft_rotated=200.0, svd=300.0)
    methods["soft"]["gb_per_s"] = {"median": 7.0}
    row = {"clients": 16, "rank": 16, "width": 768, "methods": methods, "choosing": rates(**{"full SVD": 0.1})}
    row["torch"] = rates(**{"QR-based SVD": 500.0, "full SVD of the product": 0.2})
    found = module.checks([row, row | {"rank": 4}], 10.0)
    expected = (0.7, True), (1.2, True), (3000.0, True), (3.0, False)
    for (value, holds), check in zip(expected, found.values(), strict=True):
        assert check["by_clients"] == {"16": pytest.approx(value)} and check["holds"] is holds
    assert module.checks([row | {"rank": 4}], 10.0) == {}


def test_the_benchmark_adds_up_and_goes_on_where_it_stopped(benchmark, monkeypatch, tmp_path, capsys):
    """The JSON's own arithmetic, with a user's own sparsifier; a second start measures the new size alone."""
    pytest.importorskip("torch")
    module = benchmark("sparsifier_throughput")
    few = {m.name: m for m in (soft.METHOD, soft_rotated.METHOD, svd.METHOD)}

    def catalogue(own):
        return SimpleNamespace(by_slot={"sparsifier": few | {method.name: method for method in own}})

    monkeypatch.setattr(module, "Catalogue", SimpleNamespace(of=catalogue))
    mine, out = tmp_path / "mine.py", tmp_path / "out.json"
    mine.write_text(
        "from fedjax_lora.methods import Method\nfrom fedjax_lora.sparsifiers import dense\n"
        "METHOD = Method('sparsifier', 'mine', dense.DenseConfig, dense.make)\n"
    )
    given = ["x", "--ranks", "4", "--widths", "6", "--repeats", "2", "--seconds", "0", "--copy-numbers", "1000"]
    given += ["--skip-energy", "--methods", str(mine), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*given, "--clients", "2"])
    module.main()
    first = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == first
    (row,) = first["rows"]
    assert list(row["methods"]) == ["soft", "soft_rotated", "svd", "mine"]
    best = max(rate["median"] for rate in first["copy_gb_per_s"].values())
    for each in row["methods"].values():
        assert each["floor_bytes"] == 3 * 4 * 2 * 4 * 6 + 2 * each["bits"] / 8
        assert each["clients_per_s"] == pytest.approx(2 / each["call_s"]["median"])
        assert each["gb_per_s"]["max"] == pytest.approx(each["floor_bytes"] * 1e-9 / each["call_s"]["min"])
        assert each["share_of_copy"] == pytest.approx(each["gb_per_s"]["median"] / best)
    assert row["methods"]["mine"]["bits"] == 2 * 4 * 6 * 32
    monkeypatch.setattr(sys, "argv", [*given, "--clients", "2", "4"])
    module.main()
    again = json.loads(out.read_text())["rows"]
    assert [row["clients"] for row in again] == [2, 4]
    assert again[0]["methods"]["soft"]["call_s"] == row["methods"]["soft"]["call_s"]


def test_kept_energy_is_that_of_the_full_products(benchmark):
    """NumPy, from products before and after; all of it arrives where all is sent."""
    energy = benchmark("sparsifier_energy")
    start = random_adapters(0)
    cohort = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained_from(start, seed) for seed in (1, 2)))
    share, bits = energy.shares(dense.make(dense.DenseConfig(), context(start)), start, cohort, RANK, scope())
    assert share == pytest.approx(1.0, abs=1e-5) and bits > 0
    method = soft.make(soft.SoftConfig(), context(start))
    share, _ = energy.shares(method, start, cohort, KEPT, scope())
    expected = []
    for client in range(2):
        lost = whole = 0.0
        for name, factors in cohort.modules.items():
            old = start.modules[name]
            a, b, a0, b0 = (np.float64(x) for x in (factors.a[client], factors.b[client], old.a, old.b))
            parts = np.einsum("lnr,lrm->lrnm", a, b) - np.einsum("lnr,lrm->lrnm", a0, b0)
            sizes = np.linalg.norm(parts, axis=(-2, -1))
            for layer, of in enumerate(sizes):
                dropped = parts[layer, np.argsort(of)[:-KEPT]].sum(0)
                lost, whole = lost + np.sum(dropped**2), whole + np.sum(parts[layer].sum(0) ** 2)
        expected.append(1 - lost / whole)
    assert share == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_figure_shows_each_method_at_its_rate_and_energy(benchmark, monkeypatch, tmp_path):
    """By hand; and a picture in the format of its name."""
    figure = benchmark("sparsifier_figure")
    energy = {"soft": {"kept_energy": 0.8}, "svd": {"kept_energy": 0.9}}
    own = {"soft": {"clients_per_s": 40.0}, "svd": {"clients_per_s": 20.0}}
    row = {"clients": 16, "rank": 16, "width": 768, "methods": own}
    row["torch"] = {"QR-based SVD": {"clients_per_s": 30.0}, "topk of values": {"clients_per_s": 3.0}}
    result = {"rows": [row | {"clients": 2}, row, row | {"rank": 4, "clients": 99}], "energy": {"methods": energy}}
    found = [("soft", 40.0, 0.8, "own"), ("svd", 20.0, 0.9, "own"), ("PyTorch, QR-based SVD", 30.0, 0.9, "peer")]
    assert figure.points(result) == found and figure.shown(result)["clients"] == 16
    source, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    source.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["x", str(source), str(picture)])
    figure.main()
    assert "<svg" in picture.read_text()
