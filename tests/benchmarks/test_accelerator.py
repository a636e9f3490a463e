"""The benchmark of accelerators: what is asked of its parts by hand, how it goes on, and its kernels at toy size."""

import json
import sys

import pytest


def test_checks_say_what_was_asked_and_found(benchmark):
    """By hand; a part that failed or is absent is asked nothing."""
    module = benchmark("accelerator")
    kernels = {
        "soft_sparsify, x": {"xla": {"gb_per_s": 900.0}, "pallas": {"error": "no"}},
        "soft_sparsify packed, x": {"xla": {"gb_per_s": 100.0}, "pallas": {"gb_per_s": 700.0}},
        "lora_matmul, x": {"xla_over_pallas": 1.5},
        "lora_matmul, y": {"xla_over_pallas": 0.5},
        "part_s": 3.0,
    }
    parts = {
        "ceilings": {"device": "NVIDIA H100 80GB HBM3", "bfloat16, TFLOP/s": 700.0, "copy, GB/s": 1000.0},
        "roberta_base": {"tflops": 494.5, "over_the_frozen_model_alone": 0.2},
        "trials": {"ratio": 12.0},
        "kernels": kernels,
    }
    found = module.checks(parts)
    expected = (0.5, True), (0.2, False), (12.0, True), (0.7, False), (0.5, False)
    assert [(check["value"], check["holds"]) for check in found.values()] == [
        (pytest.approx(value), holds) for value, holds in expected
    ]
    unknown = parts | {"ceilings": {**parts["ceilings"], "device": "cpu"}, "trials": {"error": "took too long"}}
    found = module.checks(unknown)
    assert found["roberta_base, share of peak"]["value"] == pytest.approx(494.5 / 700)
    assert not any(name.startswith("trials") for name in found)


def test_a_second_start_runs_what_failed_or_found_no_time(benchmark, monkeypatch, tmp_path):
    """By the parts that are begun: each once, but for the one that failed."""
    module, out, begun = benchmark("accelerator"), tmp_path / "out.json", []

    def run(part, options, limit):
        begun.append((part, limit <= options.limit))
        return {"error": "no"} if part == "peer" and len(begun) < 3 else {"value": 1.0}

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "model_folder", lambda given: "folder")
    command = ["x", "--out", str(out), "--only", "ceilings", "peer"]
    for budget, expected in (("0", []), ("400", ["ceilings", "peer"]), ("400", ["peer"]), ("400", [])):
        before = len(begun)
        monkeypatch.setattr(sys, "argv", [*command, "--budget", budget])
        module.main()
        assert begun[before:] == [(part, True) for part in expected]
    parts = json.loads(out.read_text())["parts"]
    assert {name: part["value"] for name, part in parts.items()} == {"ceilings": 1.0, "peer": 1.0}
    assert all("git_commit" in part and part["part_s"] >= 0 for part in parts.values())


def test_every_part_is_a_function_of_its_module(benchmark):
    """Oracle: the modules."""
    for name, module in benchmark("accelerator").PARTS.items():
        assert callable(getattr(benchmark(module), name))


def test_kernels_and_references_agree_and_rates_add_up(benchmark):
    """Oracle: XLA's program of the same meaning, and the row's own numbers."""
    rows = benchmark("accelerator_kernels").kernels("", quick=True)
    assert {name.split(",")[0].split()[0] for name in rows} == {
        "soft_sparsify",
        "masked_mean",
        "rank_energy",
        "rotate_ranks",
        "lora_matmul",
    }
    for name, row in rows.items():
        assert row["largest_relative_difference"] < (2e-2 if name.startswith("lora_matmul") else 1e-4), name
        for implementation in ("xla", "pallas"):
            seconds = row[implementation]["call_s"]
            assert row[implementation]["gb_per_s"] == pytest.approx(row["bytes"] * 1e-9 / seconds)
    soft = next(row for name, row in rows.items() if name.startswith("soft_sparsify,"))
    assert soft["bytes"] == (4 + 1 + 4) * 2 * 4 * 2 * 32 * 8  # four clients read, the start read, four written
