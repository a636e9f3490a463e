"""Accuracy of the sparsifiers on SST-2 with MiniLM, and one long iid run; prints JSON and resumes where it stopped.

The setting: 10 of 50 clients a round, Dirichlet(0.5), 14 rounds of 10 steps on batches of 8, 48 tokens, mean pooling,
r = 8 on query and value, AdamW 3e-3 with linear decay, clients weighted equally, no network. The iid run deals the
sentences evenly: 80 rounds in which 4 of 50 clients each go once through their sentences, at 2e-3.
"""

import argparse
import json
import statistics
from pathlib import Path

import common
import jax

from fedjax_lora import use_cpu_cores
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig, load_config

METHODS = {
    "dense": ["sparsifier.name=dense"],
    "soft 1/2": ["sparsifier.name=soft", "control.keep_ratio=0.5"],
    "soft 1/4": ["sparsifier.name=soft", "control.keep_ratio=0.25"],
    "soft_rotated 1/4": ["sparsifier.name=soft_rotated", "sparsifier.keep_norm=true", "control.keep_ratio=0.25"],
    "soft_rotated 1/8": ["sparsifier.name=soft_rotated", "sparsifier.keep_norm=true", "control.keep_ratio=0.125"],
}
SETTING = [
    "rounds=14",
    "lora.targets=[query, value]",
    "data.source=tsv",
    "data.max_length=48",
    "clients.count=50",
    "clients.per_round=10",
    "clients.weighting=equal",
    "local.optimizer.learning_rate=3e-3",
    "local.optimizer.schedule=linear",
    "control.name=ideal",
    "engine.eval_every=14",
]
IID = [
    *SETTING,
    *METHODS["dense"],
    "rounds=80",
    "clients.partition.kind=iid",
    "clients.per_round=4",
    "local.steps=17",
    "local.optimizer.learning_rate=2e-3",
    "engine.eval_every=20",
]


def measure(config: ExperimentConfig) -> dict:
    """One run: accuracy and loss at its end, and what it sent."""
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    _, metrics = simulation.run(state, config.rounds)
    return {
        "accuracy": float(metrics.eval_accuracy[-1]),
        "eval_loss": float(metrics.eval_loss[-1]),
        "uplink_bits": int(metrics.uplink_bits.sum()),
        "sparsification_error": float(metrics.sparsification_error.mean()),
        "covariance_error": float(metrics.covariance_error.mean()),
        "partition_hash": simulation.facts.partition_hash,
    }


def summarize(runs: dict[str, dict], seeds: int) -> dict[str, dict]:
    """Mean and deviation over the seeds, and the differences from `dense`."""
    table = {}
    for method in METHODS:
        rows = [runs[f"{method} seed {seed}"] for seed in range(seeds)]
        accuracies = [row["accuracy"] for row in rows]
        table[method] = {
            "accuracy_mean": statistics.mean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if seeds > 1 else None,
            "eval_loss_mean": statistics.mean(row["eval_loss"] for row in rows),
            "uplink_bits": rows[0]["uplink_bits"],
        }
    for row in table.values():
        row["accuracy_over_dense"] = row["accuracy_mean"] - table["dense"]["accuracy_mean"]
        row["bits_share_of_dense"] = row["uplink_bits"] / table["dense"]["uplink_bits"]
    return table


def main() -> None:
    """Run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", help="sentence<TAB>label lines")
    parser.add_argument("test", help="sentence<TAB>label lines")
    parser.add_argument("--model", default=None, help="folder or hub id; the installed package's by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sst2_accuracy.json"))
    options = parser.parse_args()
    environment = common.environment()  # before the output, which git may know, is written
    use_cpu_cores()
    model = common.model_folder(options.model)
    files = [f"model.pretrained={model}", f"data.train={options.train}", f"data.test={options.test}"]

    kept = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    plan = {
        f"{method} seed {seed}": [*SETTING, *overrides, f"seed={seed}"]
        for seed in range(options.seeds)
        for method, overrides in METHODS.items()
    }
    plan["iid dense seed 0"] = IID
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, overrides in plan.items():
        if kept["runs"].get(name, {}).get("overrides") != overrides:
            made_with = {"overrides": overrides, "git_commit": environment["git_commit"]}
            kept["runs"][name] = {**made_with, **measure(load_config(None, [*files, *overrides]))}
            print(name, kept["runs"][name], flush=True)
            options.out.write_text(json.dumps(kept, indent=2) + "\n")
    result = {
        "setting": SETTING,
        "iid_setting": IID,
        "environment": environment,
        "table": summarize(kept["runs"], options.seeds),
        "runs": kept["runs"],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["table"] | {"iid dense": kept["runs"]["iid dense seed 0"]}, indent=2))


if __name__ == "__main__":
    main()
