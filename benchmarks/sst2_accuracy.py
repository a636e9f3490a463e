"""Accuracy of the sparsifiers on SST-2 with MiniLM, and one long iid run: a sweep that resumes; prints JSON.

The setting: 10 of 50 clients a round, Dirichlet(0.5), 14 rounds of 10 steps on batches of 8, 48 tokens, mean pooling,
r = 8 on query and value, AdamW 3e-3 with linear decay, clients weighted equally, no network. The iid run deals the
sentences evenly: 80 rounds in which 4 of 50 clients each go once through their sentences, at 2e-3.
"""

import argparse
import json

import common
import swept

from fedjax_lora import load_config, use_cpu_cores
from fedjax_lora.config.sweeps import Setting, overrides
from fedjax_lora.report.cells import Spread
from fedjax_lora.report.runs import Run

METHODS: dict[str, Setting] = {
    "dense": {"sparsifier": "dense"},
    "soft 1/2": {"sparsifier": "soft", "control.keep_ratio": 0.5},
    "soft 1/4": {"sparsifier": "soft", "control.keep_ratio": 0.25},
    "soft_rotated 1/4": {"sparsifier": "soft_rotated", "sparsifier.keep_norm": True, "control.keep_ratio": 0.25},
    "soft_rotated 1/8": {"sparsifier": "soft_rotated", "sparsifier.keep_norm": True, "control.keep_ratio": 0.125},
}
SETTING: Setting = {
    "rounds": 14,
    "lora.targets": ["query", "value"],
    "data.source": "tsv",
    "data.max_length": 48,
    "clients.count": 50,
    "clients.per_round": 10,
    "clients.weighting": "equal",
    "local.optimizer.learning_rate": 3e-3,
    "local.optimizer.schedule": "linear",
    "control.name": "ideal",
    "engine.eval_every": 14,
}
IID: Setting = {
    **METHODS["dense"],
    "rounds": 80,
    "clients.partition.kind": "iid",
    "clients.per_round": 4,
    "local.steps": 17,
    "local.optimizer.learning_rate": 2e-3,
    "engine.eval_every": 20,
}


def told(run: Run, setting: Setting) -> dict:
    """Of one run: accuracy and loss at its end, and what it sent."""
    return {
        "overrides": overrides({**SETTING, **setting}),
        "git_commit": run.summary["git_commit"],
        "accuracy": run.summary["final_accuracy"],
        "eval_loss": run.metrics[-1]["eval_loss"],
        "uplink_bits": run.summary["total_uplink_bits"],
        "sparsification_error": swept.mean(line["sparsification_error"] for line in run.metrics),
        "covariance_error": swept.mean(line["covariance_error"] for line in run.metrics),
        "partition_hash": run.summary["partition_hash"],
    }


def summarize(runs: dict[str, dict], seeds: int) -> dict[str, dict]:
    """Mean and deviation over the seeds, and the differences from `dense`."""
    table = {}
    for method in METHODS:
        rows = [runs[f"{method} seed {seed}"] for seed in range(seeds)]
        accuracy = Spread.of(row["accuracy"] for row in rows)
        assert accuracy  # there is a seed at least
        table[method] = {
            "accuracy_mean": accuracy.mean,
            "accuracy_deviation": accuracy.deviation,
            "eval_loss_mean": swept.mean(row["eval_loss"] for row in rows),
            "uplink_bits": rows[0]["uplink_bits"],
        }
    for row in table.values():
        row["accuracy_over_dense"] = row["accuracy_mean"] - table["dense"]["accuracy_mean"]
        row["bits_share_of_dense"] = row["uplink_bits"] / table["dense"]["uplink_bits"]
    return table


def main() -> None:
    """Run what the folder does not hold yet."""
    options = swept.parsed(argparse.ArgumentParser(description=__doc__), "sst2_accuracy", seeds=3)
    environment = common.environment()  # before the output, which git may know, is written
    use_cpu_cores()
    base = load_config(None, overrides({**swept.text(options), **SETTING}))
    settings = {
        f"{name} seed {seed}": {**METHODS[name], "seed": seed} for seed in range(options.seeds) for name in METHODS
    }
    settings["iid dense seed 0"] = IID
    found = swept.run(options.folder, settings, base, environment)
    runs = {name: told(run, settings[name]) for name, run in found.items()}
    table, iid = summarize(runs, options.seeds), overrides({**SETTING, **IID})
    result = {"setting": overrides(SETTING), "iid_setting": iid, "environment": environment}
    options.out.write_text(json.dumps({**result, "table": table, "runs": runs}, indent=2) + "\n")
    print(json.dumps(table | {"iid dense": runs["iid dense seed 0"]}, indent=2))


if __name__ == "__main__":
    main()
