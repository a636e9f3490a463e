"""Runs of each task: what is measured of a state, by NumPy from the outputs that `predict` gives."""

import dataclasses
from typing import Literal

import jax
import numpy as np
import pytest

import fedjax_lora as fl
import toy
from fedjax_lora.config import assemble
from fedjax_lora.core.learning import Features
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import IGNORED
from fedjax_lora.data import packing
from fedjax_lora.data.sources import arrays
from fedjax_lora.models import bert

WORDS, LONGEST = 13, 16
SETTINGS = [
    "rounds=2",
    "model.name=reader",
    "data.source=lines",
    "clients.count=4",
    "local.steps=2",
    "local.batch_size=4",
    "local.optimizer={name: sgd, learning_rate: 0.2}",
    "lora={targets: [query, up], max_rank: 2, rank: 2}",
    "control.name=fixed",
    "sparsifier=dense",
    "engine={eval_every: 2, eval_batch_size: 5, client_chunk: 2}",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig(Options):
    """A small encoder that also tells what its table of words says of each position."""

    name: Literal["reader"] = "reader"


SHAPE = bert.BertConfig(vocab_size=WORDS, width=12, num_layers=1, num_heads=3, mlp_width=20, max_positions=LONGEST)


def encoder(options: ReaderConfig, context: Context):
    return bert.bert(SHAPE, context.made["task"], context.made["adapter"])


def reader(options: ReaderConfig, context: Context):
    task = context.made["task"]

    def read(base, adapters, hidden, key):
        features = bert.features(SHAPE, base, hidden)
        own = Features(hidden, features.pooled, lambda: hidden.values @ base["embeddings"]["word"].T)
        return task.read(adapters.head, own)

    return encoder(options, context)._replace(task=read)


READER = Method("model", "reader", ReaderConfig, reader)


@pytest.fixture(autouse=True)
def few_widths(monkeypatch):
    """Each is a program more to compile."""
    monkeypatch.setattr(packing, "WIDTHS", 2)


def pool(learns, size, seed):
    random = np.random.default_rng(seed)
    real = np.arange(LONGEST) < np.minimum(random.geometric(0.2, size), LONGEST)[:, None]
    ids = random.integers(1, WORDS, (size, LONGEST)) * real
    targets = {
        "number": (ids.sum(1) / 20).astype(np.float32),
        "token_label": np.where(real, ids % 3, IGNORED),
        "next_token": np.where(real[:, 1:], ids[:, 1:], IGNORED),
    }
    targets["next_token"] = np.pad(targets["next_token"], ((0, 0), (0, 1)), constant_values=IGNORED)
    label = random.integers(0, 3, size)
    return {"input_ids": ids, "attention_mask": real.astype(int), "label": label, "target": targets[learns]}


def outcome(task, learns, silent=False):
    lines = arrays("lines", train=pool(learns, 60, 0), test=pool(learns, 13, 1), class_names=("a", "b", "c"))
    methods = [READER._replace(make=encoder if silent else reader), lines]
    simulation = fl.build(fl.load_config(None, [*SETTINGS, f"task={task}"], methods=methods), methods=methods)
    state, metrics = simulation.run(simulation.init(jax.random.key(1)), 2)
    outputs = simulation.predict(state, {name: leaf for name, leaf in pool(learns, 13, 1).items() if name != "target"})
    return simulation, state, metrics, np.asarray(outputs, np.float64), pool(learns, 13, 1)["target"]


def near(metrics, **expected):
    """After the last round, and not measured after the first."""
    for name, value in expected.items():
        found = getattr(metrics, name) if hasattr(metrics, name) else metrics.methods[f"task/{name}"]
        np.testing.assert_allclose(found, [np.nan, value], rtol=2e-4, err_msg=name)


def of_tokens(outputs, target):
    place = target != IGNORED
    logits, true = outputs[place], target[place]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, true[:, None], 1)[:, 0]
    return losses.mean(), (logits.argmax(-1) == true).mean()


def test_regression():
    simulation, state, metrics, outputs, target = outcome("regression", "number")
    assert outputs.shape == (13,) and state.adapters.head["w"].shape == (12, 1)
    near(metrics, eval_loss=np.mean((outputs - target) ** 2), pearson=np.corrcoef(outputs, target)[0, 1])
    assert np.isnan(metrics.eval_accuracy).all() and "task/worst_tenth_accuracy" not in metrics.methods
    assert simulation.layout.packing is not None


def test_token_classification():
    _, state, metrics, outputs, target = outcome("token_classification", "token_label")
    assert state.adapters.head["w"].shape == (12, 3)
    loss, accuracy = of_tokens(outputs, target)
    near(metrics, eval_loss=loss, eval_accuracy=accuracy)


def test_causal_language_modelling_has_no_head():
    _, state, metrics, outputs, target = outcome("causal_lm", "next_token")
    assert state.adapters.head == {} and outputs.shape == (13, LONGEST, WORDS)
    loss, accuracy = of_tokens(outputs, target)
    near(metrics, eval_loss=loss, eval_accuracy=accuracy, perplexity=np.exp(loss))


@pytest.mark.parametrize(("task", "learns"), [("token_classification", "token_label"), ("causal_lm", "next_token")])
def test_a_run_on_packed_batches_is_that_on_padded_ones(monkeypatch, task, learns):
    simulation, state, metrics, *_ = outcome(task, learns)
    assert simulation.layout.packing is not None
    monkeypatch.setattr(assemble, "packing_of", lambda *given, **more: None)
    padded, expected_state, expected, *_ = outcome(task, learns)
    assert padded.layout.packing is None
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected, name), rtol=2e-4, err_msg=name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), state.adapters, expected_state.adapters
    )


def test_classification_and_the_worst_tenth_of_the_clients():
    """Oracle: scikit-learn, and a loop over the six clients, of whom the worst tenth is one."""
    metrics = pytest.importorskip("sklearn.metrics")
    simulation = toy.simulation("rounds=2", "engine.eval_every=2")
    state, rows = simulation.run(simulation.init(jax.random.key(0)), 2)
    data = simulation.world.data
    found = np.asarray(simulation.predict(state, {"image": data.test["image"]})).argmax(1)
    label, held = np.asarray(data.test["label"]), np.asarray(data.train["label"])
    of_class = np.array([np.mean(found[label == y] == y) for y in range(10)])
    clients = zip(np.asarray(data.index), np.asarray(data.count), strict=True)
    near(
        rows,
        eval_accuracy=np.mean(found == label),
        macro_f1=metrics.f1_score(label, found, average="macro", zero_division=0),
        matthews=metrics.matthews_corrcoef(label, found),
        worst_tenth_accuracy=min(of_class[held[own[:count]]].mean() for own, count in clients),
    )


def test_a_model_without_logits_is_refused_in_one_line():
    with pytest.raises(fl.ConfigError, match=r"^task.name must not be causal_lm where the model has no logits of the"):
        outcome("causal_lm", "next_token", silent=True)


def test_a_model_is_asked_anew_where_another_has_its_name():
    """The second is refused though the first, of the same name and shapes, has logits."""
    outcome("causal_lm", "next_token")
    test_a_model_without_logits_is_refused_in_one_line()
