"""Runs on text: with batches packed as `build` has it, against the same run on padded batches."""

import jax
import numpy as np
import pytest

import fedjax_lora as fl
from fedjax_lora.config import assemble
from oracles.toy_bert import WORDS, save_toy_bert, save_toy_llama

SETTINGS = [
    "rounds=2",
    "data.source=tsv",
    "data.max_length=24",
    "clients.count=4",
    "clients.per_round=3",
    "local.steps=2",
    "local.batch_size=4",
    "local.optimizer={name: sgd, learning_rate: 0.5}",
    "lora={targets: [query, up], max_rank: 2, rank: 2}",
    "control.name=fixed",
    "engine={eval_every: 1, eval_batch_size: 5, client_chunk: 2}",
]
CASES = {
    "whole models, dropout": ["sparsifier=dense", "model.dropout=0.2"],
    "personal parts": ["sparsifier=dense", "aggregation=fedsa"],
    "split in int8": ["sparsifier=dense", "training={name: split, exchange: int8, device_layers: 1}"],
    "one server copy": ["sparsifier=dense", "training={name: split, server_adapters: shared}"],
    "bfloat16": ["sparsifier=dense", "model.compute_dtype=bfloat16"],
    "a decoder": ["lora.targets=[q_proj, down_proj]", "model.pooling=last"],
}
FAST = ["personal parts"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A small BERT, a Llama and sentences of 1 to 20 words, as overrides by family."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 13)):
        lengths = np.minimum(random.geometric(0.2, count), 20)
        lines = (f"{' '.join(random.choice(WORDS, length))}\t{random.integers(2)}\n" for length in lengths)
        (folder / f"{name}.tsv").write_text("".join(lines))
    models = {"bert": save_toy_bert(folder / "bert"), "llama": save_toy_llama(folder / "llama")}
    data = [f"data.{name}={folder / name}.tsv" for name in ("train", "test")]
    return {family: [f"model.pretrained={model}", *data] for family, model in models.items()}


def outcome(settings):
    simulation = fl.build(fl.load_config(None, settings))
    state, metrics = simulation.run(simulation.init(jax.random.key(1)), 2)
    return simulation, state, metrics


def conditionals(simulation):
    """In the program of a segment."""
    state = simulation.init(jax.random.key(1))
    lowered = jax.jit(simulation.program.segment).lower(simulation.world, state, np.int32(1))
    return lowered.as_text().count("stablehlo.case")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in CASES])
def test_a_run_on_packed_batches_is_that_on_padded_ones(given, monkeypatch, case):
    settings = [*given["llama" if case == "a decoder" else "bert"], *SETTINGS, *CASES[case]]
    simulation, state, metrics = outcome(settings)
    branches = conditionals(simulation)
    packing = simulation.layout.packing
    assert packing is not None and packing.rows * packing.widths[0] < 5 * 24
    monkeypatch.setattr(assemble, "packing_of", lambda *given, **more: None)
    padded, expected_state, expected = outcome(settings)
    assert padded.layout.packing is None
    assert branches >= conditionals(padded) + 2  # of training and of evaluation
    near = {"rtol": 3e-2, "atol": 3e-3} if case in ("bfloat16", "split in int8") else {"rtol": 2e-4, "atol": 2e-6}
    for name in ("train_loss", "eval_loss", "personal_accuracy", "eval_accuracy"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected, name), **near, err_msg=name)
    for name in ("uplink_bits", "downlink_bits", "participants"):
        np.testing.assert_array_equal(getattr(metrics, name), getattr(expected, name))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=near["rtol"], atol=10 * near["atol"]),
        state.adapters,
        expected_state.adapters,
    )
