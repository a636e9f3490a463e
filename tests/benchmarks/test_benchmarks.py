"""Benchmarks at toy size: the FLOP model against a list of products, and a result's numbers against each other."""

import copy
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import vit
from oracles.model_context import model_context
from oracles.toy_bert import LAYERS, MLP, WIDTH, WORDS, save_toy_bert

ROOT = Path(__file__).parents[2]
SHAPE = ["--clients", "3", "--steps", "2", "--batch", "2", "--length", "7"]
SAMPLES = 3 * 2 * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small BERT with a tokenizer of whole words."""
    return save_toy_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def common():
    """The module that the benchmarks share."""
    spec = importlib.util.spec_from_file_location("benchmarks_common", ROOT / "benchmarks" / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def run(script, *arguments):
    """The JSON that a benchmark prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SHAPE, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_side(side, result, dtype):
    """Rates follow from the round's seconds, FLOPs from the rates."""
    rates = [SAMPLES / s for s in side["round_s"]]
    expected = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    assert side["samples_per_s"] == pytest.approx(expected)
    work = result["results"][dtype]["round"]
    assert side["gflops"] == pytest.approx(expected["median"] * work["flop"] / SAMPLES / 1e9)
    assert side["tokens_per_s"] == pytest.approx(expected["median"] * work["tokens"] / SAMPLES)
    matmul = max(result["results"][dtype]["matmul_gflops"].values())
    assert side["share_of_matmul"] == pytest.approx(side["gflops"] / matmul)
    assert side["peak_memory_bytes"] > 1e8  # a Python process with its libraries, not kibibytes


def test_flop_model_is_the_sum_over_every_product_of_a_layer(common, model):
    """Brute force: each product `[m, k] @ [k, n]` of a layer, forward, and those of the backward pass."""
    tokens = 7
    frozen = [(tokens, WIDTH, WIDTH)] * 4 + [(tokens, WIDTH, MLP), (tokens, MLP, WIDTH)]
    attention = [(tokens, WIDTH, tokens), (tokens, tokens, WIDTH)]
    flop = 0
    for m, k, n in frozen:
        flop += 2 * m * k * n  # forward
        flop += 2 * m * n * k  # gradient to the input alone
    for m, k, n in attention:
        flop += 2 * m * k * n
        flop += 2 * (2 * m * k * n)  # gradients to both operands
    assert common.Workload(model=str(model), length=tokens).flop([tokens, tokens]) == 2 * LAYERS * flop


def test_sentences_fill_their_length_and_every_client_has_its_own(common, model, tmp_path):
    """Count: one sentence for each place in a batch, of whole words that the vocabulary holds."""
    workload = common.Workload(model=str(model), clients=3, steps=2, batch=5, length=7)
    workload.write(tmp_path)
    lines = (tmp_path / "train.tsv").read_text().splitlines()
    assert len(lines) == 3 * 2 * 5
    for line in lines:
        sentence, label = line.split("\t")
        assert len(sentence.split()) == 7 - 2 and set(sentence.split()) <= set(WORDS)
        assert label in ("0", "1")


def test_slope_of_logarithms_is_that_of_a_fitted_line(common):
    """Oracles: a power law's own exponent; and NumPy's polyfit where the points lie on none."""
    sizes = [1, 3, 9, 100]
    assert common.log_log_slope(sizes, [5 * size**0.7 for size in sizes]) == pytest.approx(0.7)
    measured = [2.0, 2.5, 9.0, 4.0]
    expected = np.polyfit(np.log(sizes), np.log(measured), 1)[0]
    assert common.log_log_slope(sizes, measured) == pytest.approx(expected)


def test_round_throughput_of_the_engine_alone_adds_up(model):
    """The JSON's own arithmetic."""
    result = run(
        "round_throughput.py", "--model", model, "--repeats", 3, "--dtypes", "float32", "--skip-peer", "--skip-sweep"
    )
    assert list(result["results"]) == ["float32"]
    check_side(result["results"]["float32"]["engine"], result, "float32")
    assert 0 <= result["results"]["float32"]["cpu_share_of_others"] <= 1


def test_joined_sentences_of_a_text_have_the_label_of_the_first(common, model, tmp_path):
    text = tmp_path / "text.tsv"
    text.write_text("".join(f"s{i} t{i}\t{i % 2}\n" for i in range(40)))
    workload = common.Workload(model=str(model), clients=2, steps=2, batch=2, length=9, text=text, joined=3)
    workload.write(tmp_path)
    written = "".join((tmp_path / f"{name}.tsv").read_text() for name in ("train", "test"))
    lines = [line.split("\t") for line in written.splitlines()]
    assert len(lines) == 2 * 2 * 2 + 2
    words = [sentence.split() for sentence, _ in lines]
    assert all(len(each) == 6 for each in words)
    assert len({word for each in words for word in each}) == 60  # no sentence twice
    assert [int(label) for _, label in lines] == [int(each[0][1:]) % 2 for each in words]


@pytest.fixture
def text(tmp_path):
    """Sentences of one to five words that the vocabulary holds."""
    path = tmp_path / "text.tsv"
    path.write_text("".join(f"{' '.join(WORDS[: 1 + i % 5])}\t{i % 2}\n" for i in range(30)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["full length", "real sentences"])
def test_round_throughput_against_the_peer_adds_up_and_agrees(model, tmp_path, text, real):
    """The JSON's own arithmetic; and PyTorch's losses, round by round, on padding of its own."""
    out = tmp_path / "new" / "result.json"
    options = ["--model", model, "--repeats", 2, "--dtypes", "float32", "--skip-compile", "--out", out]
    options += ["--text", text] if real else []
    result = run("round_throughput.py", *options)
    assert json.loads(out.read_text()) == result
    found = result["results"]["float32"]
    engine, peer, check = found["engine"], found["peer"], found["check"]
    check_side(engine, result, "float32")
    check_side(peer, result, "float32")
    ratios = [b / a for a, b in zip(engine["round_s"], peer["round_s"], strict=True)]
    assert found["ratio"]["median"] == pytest.approx(statistics.median(ratios))
    fastest = max(tried["samples_per_s"] for tried in peer["tried"])
    chosen = ("attention", "frozen", "compile")
    assert any(
        tried["samples_per_s"] == fastest and all(tried[name] == peer[name] for name in chosen)
        for tried in peer["tried"]
    )
    differences = [abs(a - b) for a, b in zip(check["engine_loss"], check["peer_loss"], strict=True)]
    assert check["largest_difference"] == max(differences) <= check["tolerance"]
    assert check["agrees"] is True
    assert [swept["client_chunk"] for swept in found["client_chunk_sweep"]] == [1, 2]


@pytest.mark.slow
def test_many_clients_says_by_its_own_measurement_whether_memory_suffices(model):
    """The JSON's own arithmetic."""
    result = run("many_clients.py", "--model", model)
    found = result["results"]
    assert found["samples_per_s"] == pytest.approx(SAMPLES / found["round_s"])
    assert found["peak_memory_bytes_before_the_round"] <= found["peak_memory_bytes"]
    assert found["limit_bytes"] == 4_000_000_000
    assert found["under_limit"] is (found["peak_memory_bytes"] < found["limit_bytes"])


@pytest.fixture
def torch_digits(monkeypatch):
    """What the PyTorch peers share, imported as they do."""
    pytest.importorskip("torch")
    for folder in ("benchmarks", "benchmarks/peers"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("torch_digits")


@pytest.fixture
def digits_round(torch_digits, tmp_path):
    """A round of three clients, of one step on all that they hold, and its images."""
    random = np.random.default_rng(0)
    images, labels = random.uniform(size=(12, 8, 8)).astype(np.float32), random.integers(10, size=12, dtype=np.int32)
    np.savez(tmp_path / "pool.npz", image=images, label=labels)
    shape = {"data": str(tmp_path / "pool.npz"), "clients": 3, "steps": 1, "batch": 4, "learning_rate": 0.01}
    return torch_digits.Round(**shape, rounds=1, workers=1, threads=1, compile=0, launched=0.0), images


def test_torch_peer_is_vit_tiny_with_its_adapters(torch_digits, digits_round):
    """This project's model at the peer's weights: the same number of trained parameters, and the same logits."""
    import torch

    shape, images = digits_round
    theirs = torch_digits.Vit()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        expected = theirs(torch_digits.load(shape.data)[0]).numpy()

    held = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.named_parameters()}

    def dense(name):
        return {"w": held[f"{name}.weight"].T, "b": held[f"{name}.bias"]}

    def norm(name):
        return {"scale": held[f"{name}.weight"], "bias": held[f"{name}.bias"]}

    def block(i, names):
        return {name: (norm if "norm" in name else dense)(f"blocks.{i}.{name}") for name in names}

    names = [name for name, _ in theirs.blocks[0].named_children() if "lora" not in name]
    blocks = [block(i, names) for i in range(4)]
    base = {
        "embeddings": {"patch": dense("patch"), "position": held["position"]},
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        "norm": norm("norm"),
    }
    modules = {
        name: Factors(*(jnp.stack([held[f"blocks.{i}.{name}_lora.{leaf}"] for i in range(4)]) for leaf in "ab"))
        for name in ("query", "value", "up", "down")
    }
    scaled = {name: Factors(a=factors.a, b=2 * factors.b) for name, factors in modules.items()}  # alpha over the rank
    made = model_context(10).made
    model = vit.vit(vit.tiny((8, 8, 1)), made["task"], made["adapter"])
    adapters = Adapters(modules=scaled, head=dense("head"))
    got = jax.jit(model.apply)(base, adapters, {"image": images[..., None]})
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == len(torch_digits.Trainer(shape).vector())


def test_torch_peer_trains_as_a_plain_loop(torch_digits, digits_round):
    """A loop over copies of the model with AdamW's own formulas, and a loss that falls from round to round."""
    import torch

    shape, _ = digits_round
    trainer = torch_digits.Trainer(shape)
    start, model = trainer.vector(), shape.prepare(torch_digits.Vit)
    patches, labels = torch_digits.load(shape.data)
    for client in range(shape.clients):
        own, rows = copy.deepcopy(model), slice(4 * client, 4 * client + 4)
        loss = torch.nn.functional.cross_entropy(own(patches[rows]), labels[rows])
        parameters = torch_digits.trained(own)
        gradients = torch.autograd.grad(loss, parameters)
        ends = [p - 0.01 * g / (g.abs() + 1e-8) for p, g in zip(parameters, gradients, strict=True)]  # its first step
        expected = torch.cat([end.detach().ravel() for end in ends]).numpy()
        got, got_loss = trainer.train(start, client)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert got_loss == pytest.approx(loss.item(), rel=1e-5)

    losses, vector = [], start
    for _ in range(4):
        ends, of_clients = zip(*(trainer.train(vector, client) for client in range(shape.clients)), strict=True)
        vector = np.mean(ends, axis=0)
        losses.append(np.mean(of_clients))
    assert losses[-1] < losses[0]
