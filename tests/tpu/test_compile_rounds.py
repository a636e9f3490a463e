"""The program of a run by the compiler of TPUs: every preset, and a checkpoint of MiniLM's shape, for four chips."""

import json

import jax
import pytest

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import PRESETS, preset
from oracles.toy_bert import save_minilm

FEW = ["pretrain.steps=1"]


def check(simulation, devices):
    """Oracle: the compiler takes the program, on every chip, and its arguments are the world and the state."""
    compiled = simulation.lower(devices).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(simulation.world))
    assert memory.argument_size_in_bytes >= held
    (used,) = {sharding.device_set for sharding in jax.tree.leaves(compiled.input_shardings) if sharding is not None}
    assert used == set(devices)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_compiles_for_four_chips(name, devices):
    check(build(load_config(None, FEW, base=preset(name))), devices)


def test_a_round_of_a_language_model_compiles_for_four_chips(tmp_path, devices):
    """In bfloat16, with packed batches of sentences, rotated ranks and TSFA."""
    folder = save_minilm(tmp_path)
    lines = [f"{'good' if i % 2 else 'bad'} film{' so long' * (i % 5)}\t{i % 2}\n" for i in range(32)]
    (tmp_path / "train.tsv").write_text("".join(lines))
    config = {
        "model": {"pretrained": str(folder), "compute_dtype": "bfloat16"},
        "lora": {"targets": ["query", "value"]},
        "data": {"source": "tsv", "train": str(tmp_path / "train.tsv"), "test": str(tmp_path / "train.tsv")},
        "clients": {"count": 8},
        "control": {"name": "tsfa", "latency_budget_s": 20.0},
        "sparsifier": {"name": "soft_rotated"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    check(build(load_config(tmp_path / "config.yaml")), devices)
