"""Controllers under one latency budget, on SST-2 with MiniLM; prints JSON and resumes where it stopped.

The setting is that of `sst2_accuracy.py` in shorter rounds, 112 of 2 steps on batches of 4, with products in bfloat16,
in the default cell; who fades below 0.05 of the mean gain is let go, since the inverse of Rayleigh fading has no finite
mean. A seed is a cell of its own: its budget is a quarter of the mean latency of dense uploads over the run's own
channel, with shares of least latency. `uniform` and `fixed` send a quarter of the ranks, `ideal` all of them without a
network; `greedy` and `tsfa` choose. `tsfa 1/4` may keep a quarter of the ranks at most.

TSFA's V is in units of the budget squared, which is its own unit: V_PER_BUDGET are those that are tried. They are large
for `tsfa 1/4`, so that the queue hardly moves the ratios: a quarter of the ranks takes about the budget, and with a
smaller V many rounds pay for a long one by sending little, and none can make use of what they save.

V and the first queue (of QUEUES, in budgets) are those at which a dry run of the controller alone, over the run's
channel and with the tail energies of the cohort that trains after `PRACTICE_ROUNDS`, has a mean latency nearest to the
budget. That dry run knows the fading to come, as the budget does: the mean latency is fitted, not found. Beside it
stands what the dry run gives with that V from a queue of 0 (`from_zero`), and with the V and queue that are best on
`ELSEWHERE` other draws of fading and cohorts (`foreseen`), which an operator might know; budget and tail energies are
the run's own in all of them.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import sst2_accuracy
from controller_alone import Numbers, alone, offers_of

from fedjax_lora import build, load_config, use_cpu_cores

ELSEWHERE = 8
PRACTICE_ROUNDS = 28
QUEUES = [0.0, *np.geomspace(0.3, 30.0, 24).tolist()]
SETTING = [
    *sst2_accuracy.SETTING,
    "rounds=112",
    "local.steps=2",
    "local.batch_size=4",
    "wireless.fade_threshold=0.05",
    "model.compute_dtype=bfloat16",
    "engine.eval_every=16",
]

SPARSIFIERS = {
    "soft": ["sparsifier.name=soft"],
    "soft_rotated": ["sparsifier.name=soft_rotated", "sparsifier.keep_norm=true"],
}
V_PER_BUDGET = {"tsfa": [30.0], "tsfa 1/4": [3000.0, 4000.0]}
LIMITS = {"tsfa": [], "tsfa 1/4": ["control.max_keep_ratio=0.25"]}
CONTROLLERS = ("ideal", *LIMITS, "uniform", "fixed", "greedy")


class Start(NamedTuple):
    """What TSFA begins with: V over the budget squared, and the first queue over the budget."""

    V: float
    queue: float


def controller(name: str, budget_s: float, start: Start | None = None) -> list[str]:
    """The overrides of one of CONTROLLERS; TSFA needs a start."""
    if name in LIMITS:
        assert start  # fitted by a dry run
        return [
            "control.name=tsfa",
            f"control.latency_budget_s={budget_s}",
            f"control.V={start.V * budget_s**2}",
            f"control.queue_s={start.queue * budget_s}",
            *LIMITS[name],
        ]
    chosen = {
        "ideal": [],
        "uniform": ["control.keep_ratio=0.25"],
        "fixed": ["control.keep_ratio=0.25"],
        "greedy": [f"control.latency_budget_s={budget_s}"],
    }
    return [f"control.name={name}", *chosen[name]]


def fit_start(overrides: list[str], name: str, budget_s: float) -> dict:
    """The V and the first queue of a TSFA that spend the budget, and the mean latency of the controller alone."""
    starts = [Start(V, queue) for V in V_PER_BUDGET[name] for queue in QUEUES]
    config = load_config(None, [*overrides, *controller(name, budget_s, starts[0])])
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    trained, _ = simulation.run(state, PRACTICE_ROUNDS)
    offers, state = offers_of(simulation, trained), simulation.init(jax.random.key(config.seed))
    V, queue = (jnp.array(column, jnp.float32) for column in zip(*starts, strict=True))
    others = jax.random.split(jax.random.fold_in(state.key, config.rounds), ELSEWHERE)
    paths = jnp.concatenate([state.key[None], others])
    numbers = Numbers(V * budget_s**2, queue * budget_s)
    latency_s, _ = alone(simulation, state, paths, numbers, offers, config.rounds)
    over = latency_s.mean(2) / budget_s
    best, foreseen = (int(np.argmin(np.abs(mean - 1))) for mean in (over[0], over[1:].mean(0)))
    return {
        "start": starts[best]._asdict(),
        "latency_over_budget": float(over[0, best]),
        "from_zero": float(over[0, starts.index(Start(starts[best].V, 0.0))]),
        "foreseen": float(over[0, foreseen]),
        "foreseen_start": starts[foreseen]._asdict(),
        "foreseen_elsewhere": over[1:, foreseen].tolist(),
    }


def measure_cell(files: list[str], seed: int) -> dict:
    """What a seed's runs share: the budget, what dense sends, and where TSFA starts."""
    shared = [*files, *SETTING, f"seed={seed}"]
    config = load_config(None, [*shared, "sparsifier.name=dense", "control.name=fixed"])
    simulation = build(config)
    state = simulation.init(jax.random.key(seed))
    offers = offers_of(simulation, state)
    latency_s, bits = alone(simulation, state, state.key[None], None, offers, config.rounds)
    budget_s = float(np.mean(latency_s)) / 4
    return {
        "dense_latency_s": latency_s[0, 0].tolist(),
        "dense_uplink_bits": int(bits.sum()),
        "budget_s": budget_s,
        "tsfa": {
            f"{sparsifier} {name}": fit_start([*shared, *SPARSIFIERS[sparsifier]], name, budget_s)
            for sparsifier in SPARSIFIERS
            for name in LIMITS
        },
    }


def measure(overrides: list[str], cell: dict) -> dict:
    """One run: its evaluations over simulated time, and how it kept the budget."""
    config = load_config(None, overrides)
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    first_queue_s = float(state.methods["control"]["queue_s"]) if state.methods["control"] else 0.0
    _, metrics = simulation.run(state, config.rounds)
    bits = np.cumsum(metrics.uplink_bits)
    evaluated = np.flatnonzero(np.isfinite(metrics.eval_accuracy))
    rows = [
        {
            "round": int(metrics.round[i]),
            "elapsed_s": float(metrics.elapsed_s[i]),
            "uplink_bits": int(bits[i]),
            "accuracy": float(metrics.eval_accuracy[i]),
        }
        for i in evaluated
    ]
    return {
        "accuracy": rows[-1]["accuracy"],
        "uplink_bits": int(bits[-1]),
        "latency_over_budget": float(np.mean(metrics.latency_s, dtype=np.float64)) / cell["budget_s"],
        "queue_s": {"first": first_queue_s, "final": float(metrics.queue_s[-1])},
        "latency_s": metrics.latency_s.tolist(),
        "keep_ratio_mean": metrics.keep_ratio_mean.tolist(),
        "rows": rows,
        "partition_hash": simulation.facts.partition_hash,
    }


def run_seed(title: str) -> str:
    """The seed in a run's title."""
    return title.rsplit(" ", 1)[1]


def planned(cells: dict[str, dict]) -> dict[str, list[str]]:
    """The overrides of each run by its title, in the cells that are measured."""
    overrides = {}
    for seed, cell in cells.items():
        for sparsifier, options in SPARSIFIERS.items():
            for name in CONTROLLERS:
                fitted = cell["tsfa"].get(f"{sparsifier} {name}")
                chosen = controller(name, cell["budget_s"], Start(**fitted["start"]) if fitted else None)
                overrides[f"{sparsifier} {name} seed {seed}"] = [*SETTING, *options, *chosen, f"seed={seed}"]
    return overrides


def summarize(runs: dict[str, dict], cells: dict[str, dict]) -> dict[str, dict]:
    """Means over the seeds that have ended, the distance of the accuracy from `ideal`, and how the budget was kept."""
    asked = planned(cells)
    table, runs = {}, {key: run for key, run in runs.items() if run["overrides"] == asked.get(key)}
    for sparsifier in SPARSIFIERS:
        for name in CONTROLLERS:
            mine = {key: run for key, run in runs.items() if key.startswith(f"{sparsifier} {name} seed ")}
            ideal = {key: key.replace(f" {name} ", " ideal ") for key in mine}
            sent = [run["uplink_bits"] / cells[run_seed(key)]["dense_uplink_bits"] for key, run in mine.items()]
            apart = [run["accuracy"] - runs[ideal[key]]["accuracy"] for key, run in mine.items() if ideal[key] in runs]
            if mine:
                table[f"{sparsifier} {name}"] = {
                    "seeds": len(mine),
                    "accuracy_mean": statistics.mean(run["accuracy"] for run in mine.values()),
                    "accuracy_over_ideal": statistics.mean(apart) if apart else None,
                    "bits_share_of_dense": statistics.mean(sent),
                    "latency_over_budget": [run["latency_over_budget"] for run in mine.values()],
                    "elapsed_s": [run["rows"][-1]["elapsed_s"] for run in mine.values()],
                    "first_queue_s": [run["queue_s"]["first"] for run in mine.values()],
                    "final_queue_s": [run["queue_s"]["final"] for run in mine.values()],
                }
            if mine and name in LIMITS:
                expected = [cells[run_seed(key)]["tsfa"][f"{sparsifier} {name}"] for key in mine]
                alone = {way: [found[way] for found in expected] for way in ("from_zero", "foreseen")}
                table[f"{sparsifier} {name}"]["alone_over_budget"] = alone
    return table


def main() -> None:
    """Run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="sentence<TAB>label lines")
    parser.add_argument("test", help="sentence<TAB>label lines")
    parser.add_argument("--model", default=None, help="folder or hub id; the installed package's by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="run those whose name contains this (all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/controllers.json"))
    options = parser.parse_args()
    environment = common.environment()  # before the output, which git may know, is written
    use_cpu_cores()
    files = [f"model.pretrained={common.model_folder(options.model)}"]
    files += [f"data.train={options.train}", f"data.test={options.test}"]
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    made_with = {
        "setting": SETTING,
        "sparsifiers": SPARSIFIERS,
        "V_per_budget": V_PER_BUDGET,
        "limits": LIMITS,
        "queues": QUEUES,
        "elsewhere": ELSEWHERE,
        "practice_rounds": PRACTICE_ROUNDS,
    }
    cells = kept["cells"] if kept.get("made_with") == made_with else {}
    runs = kept.get("runs", {})  # each counts where its overrides are those that are asked for
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        result = {
            "made_with": made_with,
            "environment": environment,
            "table": summarize(runs, cells),
            "cells": cells,
            "runs": runs,
        }
        options.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")

    titles = [
        (seed, f"{s} {name} seed {seed}") for seed in range(options.seeds) for s in SPARSIFIERS for name in CONTROLLERS
    ]
    for seed, title in titles:
        if options.only not in title:
            continue
        if str(seed) not in cells:
            cells[str(seed)] = measure_cell(files, seed)
            common.note(f"cell of seed {seed}: {cells[str(seed)]}")
            write()
        overrides = planned(cells)[title]
        if runs.get(title, {}).get("overrides") != overrides:
            found = measure([*files, *overrides], cells[str(seed)])
            runs[title] = {"overrides": overrides, "git_commit": environment["git_commit"], **found}
            common.note(f"{title}: {runs[title]}")
            write()
    print(json.dumps(summarize(runs, cells), indent=2))


if __name__ == "__main__":
    main()
