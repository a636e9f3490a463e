"""Accuracy of every method at equal uplink bits, on digits or on SST-2; prints JSON and resumes where it stopped.

A method runs until its next evaluation would exceed the bits that `dense` with `fedit` sends in `--dense-rounds`
rounds, or for at most MOST_ROUNDS times as many rounds: who sends less a round is allowed more rounds, hence more
local steps, which the table states. 10 of 50 clients a round, 10 local steps on batches of 8; sparsifiers keep a
quarter. Text is computed in bfloat16, at nearly twice the speed of float32 on processors that have units for it; only
what merges into the frozen weights is computed in float32, as it must be.
"""

import argparse
import json
import statistics
from pathlib import Path

import common
import jax
import numpy as np

from fedjax_lora import use_cpu_cores
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.data.cache import cache_folder

MOST_ROUNDS = 4
EVAL_EVERY = 2

SGD = ["local.optimizer.name=sgd", "local.optimizer.learning_rate=0.1"]
METHODS = {
    "dense": ["sparsifier.name=dense"],
    "soft": ["sparsifier.name=soft", "sparsifier.send=change"],
    "soft factors": ["sparsifier.name=soft", "sparsifier.send=factors"],
    "soft lambda 0": ["sparsifier.name=soft", "sparsifier.send=change", "sparsifier.orthogonality=0"],
    "soft feedback": [
        "sparsifier.name=soft",
        "sparsifier.send=change",
        "sparsifier.orthogonality=0",
        "sparsifier.error_feedback=true",
    ],
    "soft_rotated": ["sparsifier.name=soft_rotated"],
    "soft_rotated norm": ["sparsifier.name=soft_rotated", "sparsifier.keep_norm=true"],
    "soft_rotated int8": ["sparsifier.name=soft_rotated", "wire.bits=8"],
    "top_k": ["sparsifier.name=top_k"],
    "random_rank": ["sparsifier.name=random_rank"],
    "svd": ["sparsifier.name=svd"],
    "lora_a2": ["sparsifier.name=lora_a2", "aggregation.name=rolora"],
    "flasc": ["sparsifier.name=flasc"],
    "dense int8": ["sparsifier.name=dense", "wire.bits=8"],
    "dense int4": ["sparsifier.name=dense", "wire.bits=4"],
    "ffa": ["sparsifier.name=dense", "aggregation.name=ffa"],
    "rolora": ["sparsifier.name=dense", "aggregation.name=rolora"],
    "fedex": ["sparsifier.name=dense", "aggregation.name=fedex"],
    "fedex keep": ["sparsifier.name=dense", "aggregation.name=fedex", "aggregation.start=keep"],
    "flora": ["sparsifier.name=dense", "aggregation.name=flora"],
    "flexlora": ["sparsifier.name=dense", "aggregation.name=flexlora"],
    "hetlora": ["sparsifier.name=dense", "aggregation.name=hetlora", "lora.client_ranks=[2, 4, 8]"],
    "fedsa": ["sparsifier.name=dense", "aggregation.name=fedsa"],
    "lora_fair": ["sparsifier.name=dense", "aggregation.name=lora_fair"],
    "fedavgm": ["sparsifier.name=dense", "server.name=momentum", "server.momentum=0.5"],
    "fedadam": ["sparsifier.name=dense", "server.name=adam", "server.learning_rate=0.01"],
    "fedyogi": ["sparsifier.name=dense", "server.name=yogi", "server.learning_rate=0.01"],
    "fedprox": ["sparsifier.name=dense", "drift.name=fedprox"],
    "dense sgd": ["sparsifier.name=dense", *SGD],
    "scaffold sgd": ["sparsifier.name=dense", "drift.name=scaffold", *SGD],
}
MATTER_MOST = ("dense", "soft", "soft_rotated", "top_k", "ffa", "rolora", "fedex", "flasc")
"""The eight that are run on text unless `--methods` says otherwise."""
MERGE_INTO_BASE = ("fedex", "fedex keep", "flora")

SHARED = [
    "clients.count=50",
    "clients.per_round=10",
    "clients.weighting=equal",
    "control.name=ideal",
    "control.keep_ratio=0.25",
    "local.optimizer.schedule=constant",
    f"engine.eval_every={EVAL_EVERY}",
]
TEXT = [
    "model.compute_dtype=bfloat16",
    "lora.targets=[query, value]",
    "data.source=tsv",
    "data.max_length=48",
    "local.optimizer.learning_rate=3e-3",
]


def measure(config: ExperimentConfig, budget_bits: int, most_rounds: int) -> dict:
    """One run to the end of its bits: accuracies at its evaluations, and what it spent."""
    simulation = build(config)
    state, rows, spent = simulation.init(jax.random.key(config.seed)), [], 0
    for _, metrics in simulation.segments(state, most_rounds):
        bits = int(metrics.uplink_bits.sum())
        if spent + bits > budget_bits:
            break
        spent += bits
        rows.append(metrics)
    if not rows:
        raise ValueError(f"--dense-rounds must allow {EVAL_EVERY} rounds of every method, got {budget_bits} bits")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    accuracies = joined.eval_accuracy[np.isfinite(joined.eval_accuracy)]
    personal = joined.personal_accuracy[np.isfinite(joined.personal_accuracy)]
    return {
        "final_accuracy": float(accuracies[-1]),
        "best_accuracy": float(accuracies.max()),
        "final_personal_accuracy": float(personal[-1]) if personal.size else None,
        "rounds": len(joined.round),
        "local_steps": len(joined.round) * config.local.steps,
        "uplink_bits": spent,
        "share_of_budget": spent / budget_bits,
        "downlink_bits": int(joined.downlink_bits.sum()),
        "sparsification_error": float(joined.sparsification_error.mean()),
        "covariance_error": float(joined.covariance_error.mean()),
    }


def dense_round_bits(config: ExperimentConfig) -> int:
    """Uplink bits of one round of `dense`."""
    simulation = build(config)
    _, metrics = simulation.run(simulation.init(jax.random.key(0)), 1)
    return int(metrics.uplink_bits[0])


def summarize(runs: dict[str, dict]) -> dict[str, dict]:
    """Mean and deviation over the seeds of each method and setting, the best first.

    Where clients keep adapters of their own, their personal accuracy decides: nobody uses the global model.
    """
    groups: dict[str, list[dict]] = {}
    for name, run in runs.items():
        groups.setdefault(name.rsplit(" seed ", 1)[0], []).append(run)
    table = {}
    for name, rows in groups.items():
        table[name] = {"seeds": len(rows), "rounds": rows[0]["rounds"], "local_steps": rows[0]["local_steps"]}
        accuracies = ["final_accuracy", "best_accuracy"]
        if rows[0]["final_personal_accuracy"] is not None:
            accuracies.append("final_personal_accuracy")
        for field in accuracies:
            values = [row[field] for row in rows]
            table[name][field] = statistics.mean(values)
            table[name][f"{field}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        for field in ("uplink_bits", "share_of_budget", "downlink_bits", "sparsification_error", "covariance_error"):
            table[name][field] = statistics.mean(row[field] for row in rows)

    def accuracy(row: dict) -> float:
        return row.get("final_personal_accuracy", row["final_accuracy"])

    return dict(sorted(table.items(), key=lambda item: -accuracy(item[1])))


def main() -> None:
    """Run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", help="sentence<TAB>label lines; digits where it is left out")
    parser.add_argument("--test", help="sentence<TAB>label lines")
    parser.add_argument("--model", default=None, help="folder or hub id; the installed package's by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.1], help="of the Dirichlet partition")
    parser.add_argument("--dense-rounds", type=int, default=10, help="rounds of dense whose bits all may spend")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all on digits, the eight of MATTER_MOST on text")
    parser.add_argument("--redo", action="store_true", help="run again what the file holds of these methods")
    parser.add_argument("--out", type=Path, help="benchmarks/results/method_table[_text].json where it is left out")
    options = parser.parse_args()
    environment = common.environment()  # before the output, which git may know, is written
    use_cpu_cores()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))  # seeds share most programs
    files, base, task = [], preset("digits"), "digits"
    if options.train:
        model = common.model_folder(options.model)
        task = f"{Path(options.train).name}, {Path(model).parent.name}"
        files, base = [f"model.pretrained={model}", f"data.train={options.train}", f"data.test={options.test}"], None
    methods = options.methods or (MATTER_MOST if options.train else METHODS)
    out = options.out or Path("benchmarks/results") / f"method_table{'_text' if options.train else ''}.json"
    setting = [*SHARED, *(TEXT if options.train else []), f"rounds={MOST_ROUNDS * options.dense_rounds}"]

    def configured(overrides: list[str]) -> ExperimentConfig:
        return load_config(None, [*files, *setting, *overrides], base=base)

    def overrides(method: str, alpha: float, seed: int) -> list[str]:
        whole = ["model.compute_dtype=float32"] if options.train and method in MERGE_INTO_BASE else []
        return [*METHODS[method], *whole, f"clients.partition.alpha={alpha}", f"seed={seed}"]

    runs = {
        f"{method}, alpha {alpha} seed {seed}": overrides(method, alpha, seed)
        for seed in range(options.seeds)
        for alpha in options.alphas
        for method in methods
    }
    configs = {name: configured(overrides) for name, overrides in runs.items()}  # all are checked before the first
    budget = options.dense_rounds * dense_round_bits(configured(METHODS["dense"]))
    kept = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        asked = {"task": task, "overrides": [*setting, *runs[name]], "budget_bits": budget}
        if not options.redo and asked.items() <= kept["runs"].get(name, {}).items():
            continue
        found = measure(config, budget, MOST_ROUNDS * options.dense_rounds)
        made_by = {"git_commit": environment["git_commit"], "cpu": environment["cpu"]}
        kept["runs"][name] = {**asked, **made_by, **found}
        common.note(f"{name}: {found['final_accuracy']:.4f}")
        out.write_text(json.dumps(kept, indent=2) + "\n")
    result = {"environment": environment, "table": summarize(kept["runs"]), "runs": kept["runs"]}
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["table"], indent=2))


if __name__ == "__main__":
    main()
