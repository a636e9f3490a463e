"""Split training with device scheduling, beside whole models at the devices, on SST-2 with MiniLM; prints JSON.

30 devices, Dirichlet(0.5), 40 rounds of 5 steps on batches of 8, weighted equally, in the default cell. A sample takes
1.1 GFLOP (`FLOP_FORMULA` of `common.py` at 25 tokens, about the mean), a device does 10 to 40 GFLOP/s, the server
2 TFLOP/s; who fades below 0.05 of the mean gain is let go. All are our choice. Three seeds, each a cell and a partition
of its own.

The part `schedules` cuts at the embedding and before the head, with an exchange in int8: all devices in every round;
10 of them at random, best heard, or first to end; and Lyapunov scheduling whose budget is the mean latency of the
random 10 of the same seed, at V_PER_BUDGET times the budget squared. The part `systems` sets all devices in split
training, in int8 and in float32, beside all devices that train the whole model and send every rank, or what TSFA
chooses under a budget of LATENCY_SHARE of the former's mean latency, for changes that are rotated and keep their norm
(`soft_rotated`); in CELLS of two bands and two speeds of the devices.

In split training a device computes embedding and head alone, which are not counted: its FLOP are 0. In both systems the
broadcast of the adapters takes no time; what the server sends while a device trains does.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
import swept

import fedjax_lora as fl
from fedjax_lora.config.sweeps import Setting, overrides
from fedjax_lora.report.runs import Run

FLOP_PER_SAMPLE = 1.1e9
STEPS, BATCH = 5, 8
TARGET = 0.80
SETTING: Setting = {
    "rounds": 40,
    "lora.targets": ["query", "value"],
    "data.source": "tsv",
    "data.max_length": 48,
    "clients.count": 30,
    "clients.weighting": "equal",
    "local.steps": STEPS,
    "local.batch_size": BATCH,
    "local.optimizer.learning_rate": 3e-3,
    "local.optimizer.schedule": "linear",
    "wireless.cycles_per_sample": FLOP_PER_SAMPLE,
    "wireless.cpu_hz_min": 1e10,
    "wireless.cpu_hz_max": 4e10,
    "wireless.server_hz": 2e12,
    "wireless.fade_threshold": 0.05,
    "engine.eval_every": 2,
}
SPLIT: Setting = {"sparsifier": "dense", "training": "split", "training.exchange": "int8"}
SCHEDULES: dict[str, Setting] = {
    "all": {"control": "fixed"},
    "random": {"control": "fixed", "clients.per_round": 10},
    "best_channel": {"control": "best_channel", "clients.per_round": 10},
    "min_latency": {"control": "min_latency", "clients.per_round": 10},
}
V_PER_BUDGET = (1.0, 10.0)
LYAPUNOV = {f"lyapunov {V:g}": V for V in V_PER_BUDGET}
SYSTEMS: dict[str, Setting] = {
    "split int8": {**SPLIT, "control": "fixed"},
    "split float32": {**SPLIT, "training.exchange": "float32", "control": "fixed"},
    "whole": {"sparsifier": "dense", "control": "fixed"},
}
CELLS: dict[str, Setting] = {
    f"{band / 1e6:g} MHz, {flops / 1e9:g} GFLOP/s": {
        "wireless.bandwidth_hz": band,
        "wireless.downlink_hz": band,
        "wireless.cpu_hz_min": flops,
        "wireless.cpu_hz_max": 4 * flops,
    }
    for band, flops in itertools.product((2e7, 1e8), (1e9, 1e10))
}
LATENCY_SHARE = 0.7
TSFA_V_PER_BUDGET = 30.0

Follow = Callable[[dict[str, Run]], dict[str, Setting]]
"""Runs by title -> the settings that need what they came to."""


def schedules(seeds: int, cells: Sequence[str]) -> tuple[dict[str, Setting], Follow]:
    """The baselines, and the Lyapunov schedules that follow; in the default cell."""
    del cells
    first = {
        f"{name}, seed {seed}": {**SPLIT, **own, "seed": seed}
        for seed, (name, own) in itertools.product(range(seeds), SCHEDULES.items())
    }

    def then(runs: dict[str, Run]) -> dict[str, Setting]:
        found = {}
        for seed, (name, V) in itertools.product(range(seeds), LYAPUNOV.items()):
            budget_s = mean_latency_s(runs[f"random, seed {seed}"])
            chosen = {"control": "split_lyapunov", "control.latency_budget_s": budget_s, "control.V": V * budget_s**2}
            found[f"{name}, seed {seed}"] = {**SPLIT, **chosen, "seed": seed}
        return found

    return first, then


def systems(seeds: int, cells: Sequence[str]) -> tuple[dict[str, Setting], Follow]:
    """Both systems in these cells, and TSFA that follows."""
    places = [(seed, (cell, CELLS[cell])) for seed, cell in itertools.product(range(seeds), cells)]
    first = {
        f"{name}, {cell}, seed {seed}": {**own, **numbers, "seed": seed}
        for (seed, (cell, numbers)), (name, own) in itertools.product(places, SYSTEMS.items())
    }

    def then(runs: dict[str, Run]) -> dict[str, Setting]:
        found = {}
        for seed, (cell, numbers) in places:
            budget_s = LATENCY_SHARE * mean_latency_s(runs[f"whole, {cell}, seed {seed}"])
            start = {"control.latency_budget_s": budget_s, "control.V": TSFA_V_PER_BUDGET * budget_s**2}
            chosen = {"sparsifier": "soft_rotated", "sparsifier.keep_norm": True, "control": "tsfa", **start}
            found[f"whole, soft + tsfa, {cell}, seed {seed}"] = {**chosen, **numbers, "seed": seed}
        return found

    return first, then


PARTS = {"schedules": schedules, "systems": systems}


def mean_latency_s(run: Run) -> float:
    """Of a round."""
    return float(np.mean([line["latency_s"] for line in run.metrics], dtype=np.float64))


def told(run: Run, setting: Setting) -> dict:
    """Of one run: its evaluations over simulated time, bits and device FLOP, and where it first reached TARGET."""
    split = "training" in setting  # cut at embedding and head: no layer is at the device
    taking_part = np.cumsum([line["participants"] for line in run.metrics])
    up = np.cumsum([line["uplink_bits"] for line in run.metrics])
    down = np.cumsum([line["downlink_bits"] for line in run.metrics])
    rows = [
        {
            "round": line["round"],
            "elapsed_s": line["cumulative_latency_s"],
            "uplink_bits": int(up[place]),
            "downlink_bits": int(down[place]),
            "device_flop": 0.0 if split else float(taking_part[place]) * STEPS * BATCH * FLOP_PER_SAMPLE,
            "accuracy": line["eval_accuracy"],
        }
        for place, line in enumerate(run.metrics)
        if line["eval_accuracy"] is not None
    ]
    return {
        "overrides": overrides({**SETTING, **setting}),
        "git_commit": run.summary["git_commit"],
        "device": run.summary["device"],
        "accuracy": rows[-1]["accuracy"],
        "best_accuracy": max(row["accuracy"] for row in rows),
        "mean_latency_s": mean_latency_s(run),
        "mean_participants": float(taking_part[-1] / len(run.metrics)),
        "reached": next((row for row in rows if row["accuracy"] >= TARGET), None),
        "queue_s": run.metrics[-1]["queue_s"],
        "rows": rows,
    }


def summarize(runs: dict[str, dict]) -> dict[str, dict]:
    """Means over the seeds; to TARGET over those that reached it, with their number."""
    table = {}
    for case in dict.fromkeys(title.rsplit(", seed ", 1)[0] for title in runs):
        mine = [run for title, run in runs.items() if title.startswith(f"{case}, seed ")]
        table[case] = {
            name: swept.mean(run[name] for run in mine)
            for name in ("accuracy", "best_accuracy", "mean_latency_s", "mean_participants")
        }
        reached = [run["reached"] for run in mine if run["reached"]]
        table[case] |= {"seeds": len(mine), "seeds_that_reached_target": len(reached)}
        for name in ("elapsed_s", "uplink_bits", "downlink_bits", "device_flop") if reached else ():
            table[case][f"{name}_to_target"] = swept.mean(row[name] for row in reached)
    return table


def main() -> None:
    """Run what the folder does not hold yet; what the output holds of other parts stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run (all)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="of the systems (all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of every run")
    options = swept.parsed(parser, "split_systems", seeds=3)
    environment = common.environment()  # before the output, which git may know, is written
    fl.use_cpu_cores()
    base = fl.load_config(None, [*overrides({**swept.text(options), **SETTING}), *options.set])
    for part in options.parts:
        first, then = PARTS[part](options.seeds, options.cells)
        runs = swept.run(options.folder, first, base, environment)
        more = then(runs)
        runs |= swept.run(options.folder, more, base, environment)
        found = {title: told(run, (first | more)[title]) for title, run in runs.items()}
        measured = {"table": summarize(found), "runs": found, "environment": environment, "given": options.set}
        save(options.out, part, measured)
    setting = {"setting": overrides(SETTING), "target": TARGET}
    print(json.dumps(save(options.out, "made_with", setting), indent=2))


def save(path: Path, name: str, part: dict) -> dict:
    """Write what the file held with this part in place, and return it."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | {name: part}, indent=2) + "\n")
    return held | {name: part}


if __name__ == "__main__":
    main()
