"""Controllers under one latency budget, on SST-2 with MiniLM: a sweep that resumes; prints JSON.

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
import itertools
import json
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import sst2_accuracy
import swept
from controller_alone import Numbers, latency_alone, offers_of

import fedjax_lora as fl
from fedjax_lora.config.sweeps import Setting, overrides
from fedjax_lora.data.cache import keep_programs
from fedjax_lora.report.runs import Run

ELSEWHERE = 8
PRACTICE_ROUNDS = 28
QUEUES = [0.0, *np.geomspace(0.3, 30.0, 24).tolist()]
SETTING: Setting = {
    **sst2_accuracy.SETTING,
    "rounds": 112,
    "local.steps": 2,
    "local.batch_size": 4,
    "wireless.fade_threshold": 0.05,
    "model.compute_dtype": "bfloat16",
    "engine.eval_every": 16,
}

SPARSIFIERS: dict[str, Setting] = {
    "soft": {"sparsifier": "soft"},
    "soft_rotated": {"sparsifier": "soft_rotated", "sparsifier.keep_norm": True},
}
V_PER_BUDGET = {"tsfa": [30.0], "tsfa 1/4": [3000.0, 4000.0]}
LIMITS: dict[str, Setting] = {"tsfa": {}, "tsfa 1/4": {"control.max_keep_ratio": 0.25}}
CONTROLLERS = ("ideal", *LIMITS, "uniform", "fixed", "greedy")


class Start(NamedTuple):
    """What TSFA begins with: V over the budget squared, and the first queue over the budget."""

    V: float
    queue: float


def controller(name: str, budget_s: float, start: Start | None = None) -> Setting:
    """The setting of one of CONTROLLERS; TSFA needs a start."""
    in_budget = {"control.latency_budget_s": budget_s}
    if name in LIMITS:
        assert start  # fitted by a dry run
        begun = {"control.V": start.V * budget_s**2, "control.queue_s": start.queue * budget_s}
        return {"control": "tsfa", **in_budget, **begun, **LIMITS[name]}
    chosen = {"ideal": {}, "greedy": in_budget}
    return {"control": name, **chosen.get(name, {"control.keep_ratio": 0.25})}


def fit_start(base: fl.ExperimentConfig, setting: Setting, name: str, budget_s: float) -> dict:
    """The V and the first queue of a TSFA that spend the budget, and the mean latency of the controller alone."""
    starts = [Start(V, queue) for V in V_PER_BUDGET[name] for queue in QUEUES]
    config = fl.load_config(None, overrides({**setting, **controller(name, budget_s, starts[0])}), base=base)
    simulation = fl.build(config)
    state = simulation.init(jax.random.key(config.seed))
    trained, _ = simulation.run(state, PRACTICE_ROUNDS)
    V, queue = (jnp.array(column, jnp.float32) for column in zip(*starts, strict=True))
    others = jax.random.split(jax.random.fold_in(state.key, config.rounds), ELSEWHERE)
    numbers, paths = Numbers(V * budget_s**2, queue * budget_s), jnp.concatenate([state.key[None], others])
    latency_s = latency_alone(simulation, state, paths, numbers, offers_of(simulation, trained), config.rounds)
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


def measure_cell(base: fl.ExperimentConfig, seed: int) -> dict:
    """What a seed's runs share: the budget, what dense sends, and where TSFA starts."""
    dense = {"sparsifier": "dense", "control": "fixed", "seed": seed}
    network = fl.sweep_network(base, [dense], base.rounds).rounds
    budget_s = float(np.mean(network.latency_s, dtype=np.float64)) / 4
    return {
        "dense_latency_s": network.latency_s[0].tolist(),
        "dense_uplink_bits": int(np.sum(network.uplink_bits, dtype=np.float64)),
        "budget_s": budget_s,
        "tsfa": {
            f"{sparsifier} {name}": fit_start(base, {**own, "seed": seed}, name, budget_s)
            for sparsifier, own in SPARSIFIERS.items()
            for name in LIMITS
        },
    }


def told(run: Run, setting: Setting, cell: dict) -> dict:
    """Of one run: its evaluations over simulated time, and how it kept the budget."""
    lines, latency_s = run.metrics, [line["latency_s"] for line in run.metrics]
    bits = np.cumsum([line["uplink_bits"] for line in lines]).tolist()
    rows = [
        {"round": line["round"], "elapsed_s": line["cumulative_latency_s"], "uplink_bits": sent, "accuracy": accuracy}
        for line, sent in zip(lines, bits, strict=True)
        if (accuracy := line["eval_accuracy"]) is not None
    ]
    return {
        "overrides": overrides({**SETTING, **setting}),
        "git_commit": run.summary["git_commit"],
        "accuracy": rows[-1]["accuracy"],
        "uplink_bits": bits[-1],
        "latency_over_budget": float(np.mean(latency_s)) / cell["budget_s"],
        "queue_s": {"first": run.config.get("control.queue_s", 0.0), "final": lines[-1]["queue_s"]},
        "latency_s": latency_s,
        "keep_ratio_mean": [line["keep_ratio_mean"] for line in lines],
        "rows": rows,
        "partition_hash": run.summary["partition_hash"],
    }


def run_seed(title: str) -> str:
    """The seed in a run's title."""
    return title.rsplit(" ", 1)[1]


def planned(cells: dict[str, dict]) -> dict[str, Setting]:
    """The setting of each run by its title, in the cells that are measured."""
    settings = {}
    for (seed, cell), sparsifier, name in itertools.product(cells.items(), SPARSIFIERS, CONTROLLERS):
        fitted = cell["tsfa"].get(f"{sparsifier} {name}")
        chosen = controller(name, cell["budget_s"], Start(**fitted["start"]) if fitted else None)
        settings[f"{sparsifier} {name} seed {seed}"] = {**SPARSIFIERS[sparsifier], **chosen, "seed": int(seed)}
    return settings


def summarize(runs: dict[str, dict], cells: dict[str, dict]) -> dict[str, dict]:
    """Means over the seeds that have ended, the distance of the accuracy from `ideal`, and how the budget was kept."""
    table = {}
    for sparsifier, name in itertools.product(SPARSIFIERS, CONTROLLERS):
        case = f"{sparsifier} {name}"
        mine = {run_seed(key): run for key, run in runs.items() if key.startswith(f"{case} seed ")}
        ideal = {seed: runs.get(f"{sparsifier} ideal seed {seed}") for seed in mine}
        apart = [run["accuracy"] - best["accuracy"] for seed, run in mine.items() if (best := ideal[seed])]
        sent = [run["uplink_bits"] / cells[seed]["dense_uplink_bits"] for seed, run in mine.items()]
        if mine:
            table[case] = {
                "seeds": len(mine),
                "accuracy_mean": swept.mean(run["accuracy"] for run in mine.values()),
                "accuracy_over_ideal": swept.mean(apart),
                "bits_share_of_dense": swept.mean(sent),
                "latency_over_budget": [run["latency_over_budget"] for run in mine.values()],
                "elapsed_s": [run["rows"][-1]["elapsed_s"] for run in mine.values()],
                "first_queue_s": [run["queue_s"]["first"] for run in mine.values()],
                "final_queue_s": [run["queue_s"]["final"] for run in mine.values()],
            }
        if mine and name in LIMITS:
            expected, ways = [cells[seed]["tsfa"][case] for seed in mine], ("from_zero", "foreseen")
            table[case]["alone_over_budget"] = {way: [found[way] for found in expected] for way in ways}
    return table


def main() -> None:
    """Run what the folder does not hold yet; what the output holds of the same settings stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="run those whose name contains this (all)")
    options = swept.parsed(parser, "controllers", seeds=3)
    environment = common.environment()  # before the output, which git may know, is written
    fl.use_cpu_cores()
    keep_programs()  # before the first is compiled
    base = fl.load_config(None, overrides({**swept.text(options), **SETTING}))
    made_with = {
        "setting": overrides(SETTING),
        "sparsifiers": {name: overrides(own) for name, own in SPARSIFIERS.items()},
        "V_per_budget": V_PER_BUDGET,
        "limits": {name: overrides(own) for name, own in LIMITS.items()},
        "queues": QUEUES,
        "elsewhere": ELSEWHERE,
        "practice_rounds": PRACTICE_ROUNDS,
    }
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    cells, runs = held["cells"] if held.get("made_with") == made_with else {}, held.get("runs", {})

    def write() -> dict:
        asked = {title: overrides({**SETTING, **own}) for title, own in planned(cells).items()}
        own = {title: run for title, run in runs.items() if run["overrides"] == asked.get(title)}
        table = summarize(own, cells)
        result = {"made_with": made_with, "environment": environment, "table": table, "cells": cells, "runs": own}
        options.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        return table

    every = itertools.product(range(options.seeds), SPARSIFIERS, CONTROLLERS)
    titles = [title for seed, s, name in every if options.only in (title := f"{s} {name} seed {seed}")]
    for seed in dict.fromkeys(map(run_seed, titles)):
        if seed not in cells:
            cells[seed] = measure_cell(base, int(seed))
            common.note(f"cell of seed {seed}: {cells[seed]}")
            write()
    settings = {title: own for title, own in planned(cells).items() if title in titles}
    found = swept.run(options.folder, settings, base, environment)
    runs |= {title: told(run, settings[title], cells[run_seed(title)]) for title, run in found.items()}
    print(json.dumps(write(), indent=2))


if __name__ == "__main__":
    main()
