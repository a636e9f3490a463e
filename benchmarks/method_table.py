"""Accuracy of every method at equal uplink bits, on digits or on SST-2: a sweep that resumes; prints JSON.

A method runs until its next evaluation would exceed the bits that `dense` with `fedit` sends in `--dense-rounds`
rounds, or for at most MOST_ROUNDS times as many rounds: who sends less a round is allowed more rounds, hence more
local steps, which the table states. How many rounds that is, is known afterwards: trials are extended until their bits
exceed the budget, and what comes after the last evaluation within it does not count. 10 of 50 clients a round, 10 local
steps on batches of 8; sparsifiers keep a quarter. Text is computed in bfloat16, at nearly twice the speed of float32 on
processors that have units for it; only what merges into the frozen weights is computed in float32, as it must be.
"""

import argparse
import json
from pathlib import Path

import common
import numpy as np
import swept

import fedjax_lora as fl
from fedjax_lora.config.presets import preset
from fedjax_lora.config.sweeps import Setting, folder_name, overrides
from fedjax_lora.data.cache import keep_programs
from fedjax_lora.io.run_files import is_run, read_config, read_metrics
from fedjax_lora.report.cells import Spread
from fedjax_lora.report.runs import Run

MOST_ROUNDS = 4
EVAL_EVERY = 2

SGD: Setting = {"local.optimizer.name": "sgd", "local.optimizer.learning_rate": 0.1}
SOFT: Setting = {"sparsifier": "soft", "sparsifier.send": "change"}
DENSE: Setting = {"sparsifier": "dense"}
METHODS: dict[str, Setting] = {
    "dense": DENSE,
    "soft": SOFT,
    "soft factors": {"sparsifier": "soft", "sparsifier.send": "factors"},
    "soft lambda 0": {**SOFT, "sparsifier.orthogonality": 0},
    "soft feedback": {**SOFT, "sparsifier.orthogonality": 0, "sparsifier.error_feedback": True},
    "soft_rotated": {"sparsifier": "soft_rotated"},
    "soft_rotated norm": {"sparsifier": "soft_rotated", "sparsifier.keep_norm": True},
    "soft_rotated int8": {"sparsifier": "soft_rotated", "wire.bits": 8},
    "top_k": {"sparsifier": "top_k"},
    "random_rank": {"sparsifier": "random_rank"},
    "svd": {"sparsifier": "svd"},
    "lora_a2": {"sparsifier": "lora_a2", "aggregation": "rolora"},
    "flasc": {"sparsifier": "flasc"},
    "dense int8": {**DENSE, "wire.bits": 8},
    "dense int4": {**DENSE, "wire.bits": 4},
    "ffa": {**DENSE, "aggregation": "ffa"},
    "rolora": {**DENSE, "aggregation": "rolora"},
    "fedex": {**DENSE, "aggregation": "fedex"},
    "fedex keep": {**DENSE, "aggregation": "fedex", "aggregation.start": "keep"},
    "flora": {**DENSE, "aggregation": "flora"},
    "flexlora": {**DENSE, "aggregation": "flexlora"},
    "hetlora": {**DENSE, "aggregation": "hetlora", "lora.client_ranks": [2, 4, 8]},
    "fedsa": {**DENSE, "aggregation": "fedsa"},
    "lora_fair": {**DENSE, "aggregation": "lora_fair"},
    "fedavgm": {**DENSE, "server": "momentum", "server.momentum": 0.5},
    "fedadam": {**DENSE, "server": "adam", "server.learning_rate": 0.01},
    "fedyogi": {**DENSE, "server": "yogi", "server.learning_rate": 0.01},
    "fedprox": {**DENSE, "drift": "fedprox"},
    "dense sgd": {**DENSE, **SGD},
    "scaffold sgd": {**DENSE, "drift": "scaffold", **SGD},
}
MATTER_MOST = ("dense", "soft", "soft_rotated", "top_k", "ffa", "rolora", "fedex", "flasc")
"""The eight that are run on text unless `--methods` says otherwise."""
MERGE_INTO_BASE = ("fedex", "fedex keep", "flora")

SHARED: Setting = {
    "clients.count": 50,
    "clients.per_round": 10,
    "clients.weighting": "equal",
    "control.name": "ideal",
    "control.keep_ratio": 0.25,
    "local.optimizer.schedule": "constant",
    "engine.eval_every": EVAL_EVERY,
}
TEXT: Setting = {
    "model.compute_dtype": "bfloat16",
    "lora.targets": ["query", "value"],
    "data.source": "tsv",
    "data.max_length": 48,
    "local.optimizer.learning_rate": 3e-3,
}


def rounds_to_have(folder: Path, budget_bits: int, most_rounds: int) -> int:
    """Rounds until a trial's bits exceed the budget, if the next cost as much as the last; never fewer than it has.

    A trial can be extended, since no rate depends on its rounds.
    """
    if not is_run(folder):
        return EVAL_EVERY
    rounds, bits = read_config(folder)["rounds"], [line["uplink_bits"] for line in read_metrics(folder)]
    left = budget_bits - sum(bits)
    if len(bits) < rounds or left < 0:
        return rounds
    evaluations = 1 + left // max(sum(bits[-EVAL_EVERY:]), 1)
    return max(rounds, min(rounds + EVAL_EVERY * evaluations, most_rounds))


def told(run: Run, budget_bits: int, most_rounds: int) -> dict:
    """Of one run, to the end of its bits: accuracies at its evaluations, and what it spent."""
    spent = np.cumsum([line["uplink_bits"] for line in run.metrics])
    affordable = int(np.searchsorted(spent, budget_bits, "right"))
    rounds = min(affordable // EVAL_EVERY * EVAL_EVERY, most_rounds)
    if not rounds:
        raise ValueError(f"--dense-rounds must allow {EVAL_EVERY} rounds of every method, got {budget_bits} bits")
    lines = run.metrics[:rounds]
    accuracies, personal = (
        [line[field] for line in lines if line[field] is not None] for field in ("eval_accuracy", "personal_accuracy")
    )
    return {
        **{name: run.summary[name] for name in ("git_commit", "cpu")},
        "final_accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "final_personal_accuracy": personal[-1] if personal else None,
        "rounds": rounds,
        "local_steps": rounds * run.config["local.steps"],
        "uplink_bits": int(spent[rounds - 1]),
        "share_of_budget": int(spent[rounds - 1]) / budget_bits,
        "downlink_bits": sum(line["downlink_bits"] for line in lines),
        "sparsification_error": swept.mean(line["sparsification_error"] for line in lines),
        "covariance_error": swept.mean(line["covariance_error"] for line in lines),
    }


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
        for field in ("final_accuracy", "best_accuracy", "final_personal_accuracy"):
            if spread := Spread.of(row[field] for row in rows):
                table[name] |= {field: spread.mean, f"{field}_deviation": spread.deviation}
        for field in ("uplink_bits", "share_of_budget", "downlink_bits", "sparsification_error", "covariance_error"):
            table[name][field] = swept.mean(row[field] for row in rows)
    accuracy = {name: row.get("final_personal_accuracy", row["final_accuracy"]) for name, row in table.items()}
    return {name: table[name] for name in sorted(table, key=lambda name: -accuracy[name])}


def main() -> None:
    """Run what the folder does not hold yet; what the output holds of other runs stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.1], help="of the Dirichlet partition")
    parser.add_argument("--dense-rounds", type=int, default=10, help="rounds of dense whose bits all may spend")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all on digits, the eight of MATTER_MOST on text")
    options = swept.parsed(parser, "method_table", seeds=5, dashes="--")
    environment = common.environment()  # before the output, which git may know, is written
    fl.use_cpu_cores()
    keep_programs()  # before the first is compiled
    shared, task, base = SHARED, "digits", fl.load_config(None, overrides(SHARED), base=preset("digits"))
    if options.train:
        shared, given = {**SHARED, **TEXT}, swept.text(options)
        task = f"{Path(options.train).name}, {Path(given['model.pretrained']).parent.name}"
        base = fl.load_config(None, overrides({**given, **shared}))
    most_rounds = MOST_ROUNDS * options.dense_rounds
    dense = fl.sweep(base, [{**METHODS["dense"], "rounds": 1}])
    budget_bits = options.dense_rounds * int(dense.last("uplink_bits")[0])

    def setting(method: str, alpha: float, seed: int) -> Setting:
        whole = {"model.compute_dtype": "float32"} if options.train and method in MERGE_INTO_BASE else {}
        return {**METHODS[method], **whole, "clients.partition.alpha": alpha, "seed": seed}

    settings = {
        f"{method}, alpha {alpha} seed {seed}": setting(method, alpha, seed)
        for seed in range(options.seeds)
        for alpha in options.alphas
        for method in options.methods or (MATTER_MOST if options.train else METHODS)
    }
    names, found, had = list(map(folder_name, settings.values())), {}, {}
    while (rounds := {name: rounds_to_have(options.folder / name, budget_bits, most_rounds) for name in names}) != had:
        found, had = swept.run(options.folder, settings, base, environment, rounds), rounds
    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    for name, run in found.items():
        asked = {"task": task, "overrides": overrides({**shared, **settings[name]}), "budget_bits": budget_bits}
        runs[name] = {**asked, **told(run, budget_bits, most_rounds)}
    table = summarize(runs)
    options.out.write_text(json.dumps({"environment": environment, "table": table, "runs": runs}, indent=2) + "\n")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
