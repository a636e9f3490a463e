"""Runs on a small model of each family: over the cell, cut in two, and as a sweep."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import transformers

import fedjax_lora as fl
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import IGNORED
from fedjax_lora.data import packing
from fedjax_lora.data.sources import arrays
from fedjax_lora.models import load, table
from fedjax_lora.models.families import FAMILIES
from oracles import tiny_models

pytest.importorskip("torch")

CLIENTS, STEPS, CLASSES, LENGTH, RANK, MAX_RANK = 4, 2, 3, 12, 3, 4
SETTINGS = [
    "rounds=2",
    "data.source=mine",
    f"clients={{count: {CLIENTS}, partition: {{kind: iid}}}}",
    f"lora={{max_rank: {MAX_RANK}, rank: {RANK}, alpha: 6}}",
    f"local={{steps: {STEPS}, batch_size: 30, optimizer: {{name: sgd, learning_rate: 0.05}}}}",
    "engine={eval_every: 2, eval_batch_size: 5, client_chunk: 2}",
]
CELL = ["sparsifier=soft", "control={name: tsfa, latency_budget_s: 0.001, queue_s: 0.01, V: 0.001}"]
SPLIT = "training={name: split, device_layers: 1, task: server}"


def texts(size, seed, padding, causal):
    """Of several lengths, with the token that follows each position where that is learned."""
    random = np.random.default_rng(seed)
    real = np.arange(LENGTH) < random.integers(2, LENGTH + 1, size)[:, None]
    ids = np.where(real, random.integers(4, tiny_models.VOCABULARY, (size, LENGTH)), padding)
    follows = np.pad(np.where(real[:, 1:], ids[:, 1:], IGNORED), ((0, 0), (0, 1)), constant_values=IGNORED)
    return {"input_ids": ids, "attention_mask": real.astype(int), **({"target": follows} if causal else {})}


def pool(name, size, seed, causal):
    config = tiny_models.CONFIGS[name]
    label = np.random.default_rng(seed).integers(0, CLASSES, size)
    if hasattr(config, "image_size"):
        image = np.random.default_rng(seed).random((size, *config.image_size, config.num_channels), np.float32)
        return {"image": image, "label": label}
    padding = 1 if config.pad_token_id is None else config.pad_token_id
    return {**texts(size, seed, padding, causal), "label": label}


class Given(NamedTuple):
    """A family's runs: its data, the settings, and the widths of the modules with adapters.

    widths: `[L, modules]`, rows and columns of each, by PyTorch's own model.
    """

    name: str
    source: Method
    settings: list[str]
    widths: np.ndarray

    @property
    def causal(self) -> bool:
        return "task=causal_lm" in self.settings


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Next tokens where the family tells them, else classes; adapters on the first and on the last of its modules."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    causal = "causal_lm" in FAMILIES[name].classes
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = tiny_models.save(folder, auto.from_config(tiny_models.CONFIGS[name]))
    names = [f"class {number}" for number in range(CLASSES)]
    source = arrays("mine", train=pool(name, 60, 0, causal), test=pool(name, 13, 1, causal), class_names=names)
    sites = table.sites(FAMILIES[name].weights(load.read_shape(str(folder))))
    targets = [next(iter(sites)), list(sites)[-1]]
    settings = [
        f"model.pretrained={folder}",
        f"task={'causal_lm' if causal else 'classification'}",
        f"lora.targets={targets}",
    ]
    sources = [[sites[target].source.format(layer=layer) for target in targets] for layer in range(tiny_models.LAYERS)]
    bare = model.base_model
    widths = np.array([[sum(bare.get_submodule(one).weight.shape) for one in of_layer] for of_layer in sources])
    return Given(name, source, [*SETTINGS, *settings], widths)


@pytest.fixture(autouse=True)
def few_widths(monkeypatch):
    """Each is a program more to compile."""
    monkeypatch.setattr(packing, "WIDTHS", 1)


def configuration(family, *overrides):
    return fl.load_config(None, [*family.settings, *overrides], methods=[family.source])


def run(family, *overrides, seed=0) -> Any:
    simulation = fl.build(configuration(family, *overrides, f"seed={seed}"), methods=[family.source])
    return simulation, *simulation.run(simulation.init(jax.random.key(seed)), 2)


def head_bits(family):
    return 0 if family.causal else 32 * (tiny_models.WIDTH * CLASSES + CLASSES)


def test_soft_and_tsfa_over_the_cell(family):
    """Oracle: bits of each number of components, by the shapes of PyTorch; a kept one is named in 2 bits."""
    _, _, metrics = run(family, *CELL)
    bits = [
        int(np.sum(32 * kept * family.widths + min(2 * kept, MAX_RANK))) + head_bits(family) for kept in range(RANK + 1)
    ]
    kept = np.searchsorted(bits, metrics.client_uplink_bits)
    np.testing.assert_array_equal(np.take(bits, kept, mode="clip"), metrics.client_uplink_bits)
    np.testing.assert_allclose(metrics.kept_ranks_mean, kept.mean(1), rtol=1e-6)
    assert 0 < kept.min() < kept.max()
    dense = 32 * RANK * int(family.widths.sum()) + head_bits(family)
    np.testing.assert_array_equal(metrics.client_downlink_bits, dense)
    assert metrics.nonfinite_clients.tolist() == [0, 0] and metrics.participants.tolist() == [CLIENTS] * 2
    for name in ("train_loss", "latency_s", "energy_j", "queue_s", "dropped_energy", "sparsification_error"):
        assert np.isfinite(getattr(metrics, name)).all() and (getattr(metrics, name) > 0).all(), name
    assert np.isfinite([metrics.eval_loss[-1], metrics.eval_accuracy[-1]]).all()


def test_a_run_cut_in_two(family):
    """Oracles: the uncut run; and a value for each real position and feature that crosses, with labels beside them."""
    settings = "sparsifier=dense", "control=fixed"
    simulation, state, metrics = run(family, *settings, SPLIT)
    _, expected_state, expected = run(family, *settings)
    for measured in ("train_loss", "eval_loss", "eval_accuracy"):
        np.testing.assert_allclose(getattr(metrics, measured), getattr(expected, measured), rtol=2e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), state.adapters, expected_state.adapters
    )
    data = simulation.world.data  # a batch is all that a client has
    held = [np.asarray(rows[:count]) for rows, count in zip(data.index, data.count, strict=True)]
    if "image" in data.train:
        patches = np.prod(np.array(tiny_models.CONFIGS[family.name].image_size) // 2)
        positions = [len(rows) * (patches + (2 if family.name == "deit" else 1)) for rows in held]
    else:
        positions = [np.asarray(data.train["attention_mask"])[rows].sum() for rows in held]
    labels = positions if family.causal else [len(rows) for rows in held]
    crossing = 32 * STEPS * tiny_models.WIDTH * np.array(positions)
    first_layer = 32 * RANK * int(family.widths[0].sum())
    targets = 32 * STEPS * np.array(labels)
    np.testing.assert_array_equal(metrics.client_uplink_bits, [crossing + targets + first_layer] * 2)
    np.testing.assert_array_equal(metrics.client_downlink_bits, [crossing + first_layer] * 2)


def test_a_sweep_of_two_seeds_is_its_single_runs(family):
    trials = fl.sweep(configuration(family, *CELL), over={"seed": [0, 1]}, methods=[family.source])
    singles = [run(family, *CELL, seed=seed)[2] for seed in (0, 1)]
    assert trials.status == ["ended", "ended"]
    for name in ("client_uplink_bits", "client_downlink_bits", "participants", "kept_ranks_mean"):
        found = getattr(trials.metrics, name)
        np.testing.assert_array_equal(found, [getattr(metrics, name) for metrics in singles])
    for name in ("train_loss", "eval_loss", "eval_accuracy", "latency_s", "energy_j", "queue_s", "dropped_energy"):
        found = getattr(trials.metrics, name)
        np.testing.assert_allclose(found, [getattr(metrics, name) for metrics in singles], rtol=1e-4, err_msg=name)
    assert trials.metrics.train_loss[0, 0] != trials.metrics.train_loss[1, 0]
