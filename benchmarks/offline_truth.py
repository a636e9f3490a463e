"""Is the planned rank the best one? Runs at every candidate beside the plan; prints JSON, resumes where it stopped.

A seed is a cell of its own, so that a budget is a share of what dense uploads at the highest candidate rank take there
on average, over the draws of the channel that the plan has. For each seed and budget: the plan by grid and by gradient
search on the bound, and by rollout, then the run itself to its end at every candidate, with the V and the first queue
that the grid found for that rank, and at each plan's own: `--runs` of them in the same cell, with batches and fading of
their own, whose mean counts, since one run alone says little of a difference of 0.01. The plan never sees the test
examples; the runs are scored on them. Sentences are in the setting of `controllers.py`.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import common
import controllers
import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from fedjax_lora import build, use_cpu_cores
from fedjax_lora.app.planner import Survey, choose, survey
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.config.sweeps import overrides as overrides_of
from fedjax_lora.core.network import Radio
from fedjax_lora.core.progress import Progress
from fedjax_lora.planning.rank_search import Candidate
from fedjax_lora.planning.rollout import roll_out
from fedjax_lora.wireless import min_max_latency

TEXT = overrides_of({**controllers.SETTING, **controllers.SPARSIFIERS["soft_rotated"], "control.name": "tsfa"})

WAYS = {
    "grid": {"objective": "bound", "search": "grid"},
    "gradient": {"objective": "bound", "search": "gradient"},
    "rollout": {"objective": "rollout", "search": "grid"},
}


class Setting(NamedTuple):
    """What a run takes from a row of a plan."""

    rank: int
    V: float
    queue_s: float


def setting_of(row: dict) -> Setting:
    """That of a row, or of a run."""
    return Setting(row["rank"], row["V"], row["queue_s"])


def dense_latency_s(known: Survey) -> float:
    """Mean latency of a round, by the plan's draws, in which all send every rank of the highest candidate.

    The payload is the sparsifier's own at ratio 1.
    """
    highest: Candidate = jax.tree.map(lambda leaf: leaf[-1], known.candidates)

    def in_round(radio: Radio) -> Array:
        sends = (radio.snr_hz > 0) & (highest.weights > 0)  # the cohort is padded
        bits = jnp.where(sends, highest.bits.max(), 0.0)
        return min_max_latency(bits, radio.snr_hz, radio.start_s, radio.band_hz).latency_s

    return float(jax.vmap(jax.vmap(in_round))(highest.radio).mean())


def measure(config: ExperimentConfig, settings: list[Setting], runs: int) -> list[dict]:
    """Runs to their end at each rank, V and first queue, in one program; scored on the test examples."""
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    ranks, V, queue_s = (jnp.array(column, jnp.float32) for column in zip(*settings, strict=True))
    found = roll_out(simulation, simulation.world, state, ranks, V, queue_s, runs, config.rounds)
    names = {"final_accuracy": found.accuracy, "final_loss": found.loss, "latency_s": found.latency_s}
    return [
        setting._asdict()
        | {name: float(value[i].mean()) for name, value in names.items()}
        | {"accuracies": found.accuracy[i].tolist()}
        for i, setting in enumerate(settings)
    ]


def chosen(known: Survey, config: ExperimentConfig) -> dict:
    """The plan of a configuration, with its options instead of the configuration."""
    found = choose(known, config, Progress(Console(stderr=True, quiet=True)))._asdict()
    options = dataclasses.asdict(config.plan)
    return {key: value for key, value in found.items() if key != "config"} | {"options": options}


def rows_to_run(entry: dict) -> dict[str, dict]:
    """Rows of the plans that are run: each of the grid, by its rank, and what each way chose, by its name."""
    own = {way: next(r for r in plan["rows"] if r["rank"] == plan["rank"]) for way, plan in entry["plans"].items()}
    return {str(row["rank"]): row for row in entry["plans"]["grid"]["rows"]} | own


def runs_of(entry: dict) -> dict[str, dict]:
    """The runs of `rows_to_run` that have ended."""
    found = {setting_of(run): run for run in entry["runs"]}
    return {name: found[setting_of(row)] for name, row in rows_to_run(entry).items() if setting_of(row) in found}


def is_complete(entry: dict) -> bool:
    """Whether all has been planned that was asked for, and all run that was planned."""
    return entry["plans"].keys() >= set(entry["ways"]) and runs_of(entry).keys() == rows_to_run(entry).keys()


def summarize(kept: dict[str, dict]) -> dict[str, dict]:
    """By task and budget: what each rank's runs gave over the seeds, and what each way of planning loses to the best.

    A plan is scored by the run at its own rank, V and first queue. `latency_over_budget` is of the runs, whose fading
    no plan knew.
    """
    table = {}
    for task, budget in sorted({(entry["task"], entry["budget"]) for entry in kept.values()}):
        entries = [e for e in kept.values() if (e["task"], e["budget"]) == (task, budget) and is_complete(e)]
        if not entries:
            continue
        runs = [runs_of(entry) for entry in entries]
        ranks = [row["rank"] for row in entries[0]["plans"]["grid"]["rows"]]
        accuracy = {rank: [run[str(rank)]["final_accuracy"] for run in runs] for rank in ranks}
        means = {rank: statistics.mean(values) for rank, values in accuracy.items()}
        best = max(means, key=lambda rank: means[rank])
        table[f"{task}, budget {budget}"] = {
            "seeds": len(entries),
            "runs_a_seed": [entry["runs_a_rank"] for entry in entries],
            "accuracy": means,
            "deviation": {r: statistics.stdev(v) if len(v) > 1 else None for r, v in accuracy.items()},
            "latency_over_budget": {
                rank: statistics.mean(
                    run[str(rank)]["latency_s"] / entry["budget_s"] for run, entry in zip(runs, entries, strict=True)
                )
                for rank in ranks
            },
            "best_rank": best,
            "candidates_between_grid_and_gradient": [
                abs(ranks.index(plans["grid"]["rank"]) - ranks.index(plans["gradient"]["rank"]))
                for plans in (entry["plans"] for entry in entries)
                if "gradient" in plans
            ],
            "planned": {
                way: {
                    "ranks": [entry["plans"][way]["rank"] for entry in entries],
                    "loss_to_best": means[best] - statistics.mean(run[way]["final_accuracy"] for run in runs),
                }
                for way in WAYS
                if all(way in run for run in runs)
            },
        }
    return table


def main() -> None:
    """Plan and run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", help="sentence<TAB>label lines; digits where it is left out")
    parser.add_argument("--test", help="sentence<TAB>label lines")
    parser.add_argument("--model", default=None, help="folder or hub id; the installed package's by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="in a seed's cell, at each rank")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.75], help="shares: tight, loose")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of planning; grid always")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value", dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offline_truth.json"))
    options = parser.parse_args()
    environment = common.environment()  # before the output, which git may know, is written
    use_cpu_cores()
    shared, files, base, task = options.overrides, [], preset("digits-tsfa"), "digits"
    if options.train:
        task = f"{Path(options.train).name}"
        model = common.model_folder(options.model)
        files = [f"model.pretrained={model}", f"data.train={options.train}", f"data.test={options.test}"]
        shared, base = [*TEXT, *shared], None
    held = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    setting = shared, options.runs  # entries of this task in another are not gone on with
    kept = {
        name: entry
        for name, entry in held.items()
        if entry["task"] != task or (entry["overrides"][:-1], entry["runs_a_rank"]) == setting
    }
    commit = {"git_commit": environment["git_commit"]}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        found = {"environment": environment, "table": summarize(kept), "runs": kept}
        options.out.write_text(json.dumps(found, indent=2) + "\n")

    for seed in range(options.seeds):
        known = None  # what no budget changes
        for budget in options.budgets:
            overrides = [*shared, f"seed={seed}"]
            name = f"{task}, budget {budget} seed {seed}"
            asked = {"task": task, "overrides": overrides, "budget": budget, "runs_a_rank": options.runs}
            entry = kept.setdefault(name, {**asked, "plans": {}, "runs": []})
            entry["ways"] = list(dict.fromkeys(["grid", *options.ways]))  # the runs take V and queue from the grid
            if is_complete(entry):
                continue
            if missing := [way for way in entry["ways"] if way not in entry["plans"]]:
                surveyed = load_config(None, [*files, *overrides], base=base)
                with Progress(Console(stderr=True)) as progress:
                    known = known or survey(surveyed, progress)
                entry.setdefault("budget_s", budget * dense_latency_s(known))
            in_budget = f"control.latency_budget_s={entry['budget_s']}"
            config = load_config(None, [*files, *overrides, in_budget], base=base)
            for way in missing:
                assert known  # surveyed above
                planned = dataclasses.replace(config, plan=dataclasses.replace(config.plan, **WAYS[way]))
                entry["plans"][way] = chosen(known, planned) | commit
                common.note(f"{name}, {way}: rank {entry['plans'][way]['rank']}")
                keep()
            settings = dict.fromkeys(map(setting_of, rows_to_run(entry).values()))
            if left := list(settings.keys() - set(map(setting_of, entry["runs"]))):
                entry["runs"] += [run | commit for run in measure(config, sorted(left), options.runs)]
            common.note(f"{name}: {entry['runs']}")
            keep()
    print(json.dumps(summarize(kept), indent=2))


if __name__ == "__main__":
    main()
