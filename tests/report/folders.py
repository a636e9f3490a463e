"""Folders of runs that never ran."""

import json

import yaml

from fedjax_lora.config.sweeps import folder_name
from fedjax_lora.io import sealed
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import FIELDS
from fedjax_lora.io.sweep import Sweep

ROUNDS = 6


def write_run(folder, config=None, ended=True, summary=None, **columns):
    """Half of the rounds are evaluated; what no column gives is 0.5."""
    run = RunFolder.create(folder, yaml.safe_dump(config or {"seed": 0}), {})
    with (run.path / "metrics.jsonl").open("a") as file:
        for i in range(ROUNDS):
            line = dict.fromkeys(FIELDS, 0.5) | {
                "round": i + 1,
                "personal_accuracy": None,
                "participants": 3 + i % 2,
                "nonfinite_clients": 0,
                "outages": 0,
                "uplink_bits": 10**9 + i,
                "tail_energy": [0.5, None, 0.0],
            }
            line |= {"downlink_bits": 7, "latency_s": 1.5, "cumulative_latency_s": 1.5 * (i + 1)}
            line |= {"eval_accuracy": (i + 1) / 7 if i % 2 else None, "eval_loss": 0.25 if i % 2 else None}
            file.write(json.dumps(line | {name: values[i] for name, values in columns.items()}) + "\n")
    if ended:
        written = run.write_summary(
            {"initial_accuracy": 0.1, "wall_s": 12.5, "compile_s": 2.0, "device": "1 x cpu", "seed": 0}
            | {"versions": {"jax": "0.10"}, "partition_hash": "abc", "peak_memory_bytes": 2048}
        )
        sealed.write(run.path / "summary.json", {k: v for k, v in written.items() if k != "sha256"} | (summary or {}))
    return run.path


def write_sweep(folder, trials):
    """A sweep of (swept keys, status, columns) each; a trial that is refused has no folder."""
    settings, statuses, reasons = {}, {}, {}
    for setting, status, columns in trials:
        name = folder_name(setting)
        settings[name], statuses[name] = setting, status
        if status == "refused":
            reasons[name] = "rank must be a whole number, got '<b>&'"
        else:
            write_run(folder / name, {"rounds": 9, "swept": setting}, **columns)
    return Sweep(folder, settings, statuses, reasons)
