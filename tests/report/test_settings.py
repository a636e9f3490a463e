"""What was run, in words; numbers, in one manner. The oracles are written by hand."""

from pathlib import Path

import pytest
import yaml

from fedjax_lora.config.experiment import ExperimentConfig, dump, load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.io.run_files import flatten
from fedjax_lora.report import formats
from fedjax_lora.report.runs import Run, labels
from fedjax_lora.report.settings import heading, other_than_default

TEXT = ["data={source: tsv, train: /d/train.tsv, test: d/test.tsv, max_length: 48}", "model.pretrained=hub/MiniLM"]


def run_of(config, name="run"):
    """A run as its configuration alone tells it."""
    return Run(name, flatten(yaml.safe_load(dump(config))), [], {}, Path(name))


def test_the_heading_of_a_preset():
    assert heading([run_of(preset("digits-tsfa"))]) == {
        "model": "vit-tiny",
        "data": "digits",
        "clients": "50, all every round, dirichlet 0.5",
        "method": "soft_rotated, fedit, rank 8",
        "control": "tsfa, latency budget 20 s",
        "training": "40 rounds, 10 steps × batch 8, adamw, learning rate 0.01, schedule linear",
        "seed": "0",
    }


def test_the_heading_names_what_was_chosen():
    chosen = ["sparsifier={name: soft, orthogonality: 0.5}", "drift={name: fedprox}", "clients.per_round=10"]
    chosen += ["clients.partition.kind=iid", "local.optimizer.clip_norm=1.0", "control.keep_ratio=0.25"]
    found = heading([run_of(load_config(None, [*TEXT, *chosen]))])
    assert found["model"] == "MiniLM" and found["data"] == "tsv, train.tsv, test.tsv, at most 48 tokens"
    assert found["clients"] == "10 of 64 a round, iid"
    assert found["method"] == "soft, orthogonality 0.5, fedit, fedprox, rank 8"
    assert found["control"] == "fixed, keep ratio 0.25"
    assert found["training"].endswith("adamw, learning rate 0.001, clip norm 1")


def test_the_heading_of_several_runs_keeps_what_they_share():
    few = [*TEXT, "clients.per_round=10", "sparsifier.name=dense", "clients.partition.kind=iid", "seed=1"]
    runs = [run_of(load_config()), run_of(load_config(None, few))]
    for pair in (runs, runs[::-1]):
        found = heading(pair)
        assert [found[label] for label in ("model", "data", "clients", "seed")] == ["differs"] * 4
        assert found["method"] == "fedit, rank 8" and found["control"] == "fixed, keep ratio 1"


def test_nothing_differs_from_the_defaults_but_what_was_chosen():
    assert other_than_default(run_of(ExperimentConfig()).config) == []
    chosen = ["sparsifier={name: svd}", "control={name: tsfa, V: 3.0}", "lora.targets=[query]"]
    found = other_than_default(run_of(load_config(None, chosen)).config)
    assert found == ["lora.targets", "sparsifier.name", "control.name", "control.V"]


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (({"seed": 0}, {"seed": 1}), ["seed 0", "seed 1"]),
        (({"s.name": "a", "s.x": 1}, {"s.name": "b"}), ["a", "b"]),
        (({"m": "p/a", "k_s": 2.0}, {"m": "q/a", "k_s": 3.0}), ["a, k 2 s", "a, k 3 s"]),
        (({"m": "p/a"}, {"m": "q/a"}), ["run0", "run1"]),
        (({"m": "x" * 60}, {"m": "y"}), ["run0", "run1"]),
        (({}, {}), ["run0", "run1"]),
    ],
)
def test_runs_go_by_what_differs_where_that_is_short_and_tells_them_apart(configs, expected):
    assert labels([Run(f"run{i}", config, [], {}, Path()) for i, config in enumerate(configs)]) == expected


@pytest.mark.parametrize(
    ("form", "value", "text", "exact"),
    [
        (formats.number, 33.600833, "33.6", "33.600833"),
        (formats.number, 1344.02, "1,344", "1,344.02"),
        (formats.number, 12345678.0, "12,350,000", "12,345,678"),
        (formats.number, 9.0, "9", ""),
        (formats.number, 0.0, "0", ""),
        (formats.number, 2.5e-7, "2.5e-07", ""),
        (formats.accuracy, 0.5, "0.5000", ""),
        (formats.count, 12288, "12,288", ""),
        (formats.times, 1.68432, "1.684×", "1.68432×"),
        (formats.bits, 533_120_000, "533.1 Mbit", "533,120,000 bits"),
        (formats.bits, 999, "999 bit", ""),
        (formats.bits, 999_999, "1 Mbit", "999,999 bits"),
        (formats.bits, 10**16, "10,000 Tbit", "10,000,000,000,000,000 bits"),
        (formats.memory, 1_241_513_984, "1.242 GB", "1,241,513,984 bytes"),
        (formats.setting, 0.0001234567, "0.0001234567", ""),
        (formats.setting, [True, None, 2.0, "x"], "true, –, 2, x", ""),
        (formats.setting, [], "[]", ""),
        (formats.found, {"V": 12.3456789, "rank": 4}, "V 12.3457, rank 4", ""),
    ],
)
def test_numbers_are_written_in_one_manner(form, value, text, exact):
    assert form(value) == (text, exact)
