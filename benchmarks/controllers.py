"""Controllers under one latency budget, on SST-2 with MiniLM; prints JSON and resumes where it stopped.

The setting is that of `sst2_accuracy.py` in shorter rounds, 112 of 2 steps on batches of 4, with products in bfloat16,
in the default cell; who fades below 0.05 of the mean gain is let go, since the inverse of Rayleigh fading has no finite
mean. A seed is a cell of its own: its budget is a quarter of the mean latency of dense uploads over the run's own
channel, with shares of least latency. `uniform` and `fixed` send a quarter of the ranks, `ideal` all of them without a
network; `greedy` and `tsfa` choose. `tsfa 1/4` may keep a quarter of the ranks at most.

TSFA's V is `V_PER_BUDGET` times the budget squared: it has the unit s^2, so that one number serves every cell. That of
`tsfa 1/4` is large, so that the queue hardly moves the ratios: a quarter of the ranks takes about the budget, and with
a smaller V many rounds pay for a long one by sending little, and none can make use of what they save.

TSFA starts where a dry run says: of QUEUES (in budgets), the first queue at which the controller alone, over the run's
channel and with the tail energies of the cohort that trains after `PRACTICE_ROUNDS`, has a mean latency nearest to the
budget. That dry run knows the fading to come, as the budget does: the mean latency is fitted, not found. What the
controller alone does on the run's channel without that knowledge stands beside it: from a queue of 0 (`from_zero`), and
from the queue that is best on `ELSEWHERE` other draws of fading and cohorts (`foreseen`).
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import cast

import common
import jax
import jax.numpy as jnp
import numpy as np
import sst2_accuracy
from jax import Array, lax

from fedjax_lora import Simulation, build, load_config, use_cpu_cores
from fedjax_lora.base import Adapters, FedState
from fedjax_lora.prng import round_keys
from fedjax_lora.sim.local import Trained
from fedjax_lora.sim.parts import Local, World
from fedjax_lora.sim.round import choose_cohort, control, importance, round_latency, train_locally

ELSEWHERE = 8
PRACTICE_ROUNDS = 28
QUEUES = np.concatenate([[0.0], np.geomspace(0.3, 30.0, 24)])
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
V_PER_BUDGET = {"tsfa": 30.0, "tsfa 1/4": 3000.0}
LIMITS = {"tsfa": [], "tsfa 1/4": ["control.max_keep_ratio=0.25"]}
CONTROLLERS = ("ideal", *LIMITS, "uniform", "fixed", "greedy")


def controller(name: str, budget_s: float, queue_s: float = 0.0) -> list[str]:
    """The overrides of one of CONTROLLERS; TSFA starts with a queue."""
    if name in LIMITS:
        return [
            "control.name=tsfa",
            f"control.latency_budget_s={budget_s}",
            f"control.V={V_PER_BUDGET[name] * budget_s**2}",
            f"control.queue_s={queue_s}",
            *LIMITS[name],
        ]
    chosen = {
        "ideal": [],
        "uniform": ["control.keep_ratio=0.25"],
        "fixed": ["control.keep_ratio=0.25"],
        "greedy": [f"control.latency_budget_s={budget_s}"],
    }
    return [f"control.name={name}", *chosen[name]]


def tail_energies(simulation: Simulation, state: FedState) -> Array:
    """`[C, R + 1]` of the cohort of the next round after its local training."""
    parts = simulation.parts

    @jax.jit
    def train(world: World, state: FedState) -> Array:
        cohort = choose_cohort(parts, world, state, round_keys(state.key, state.round))
        return importance(parts, cohort, train_locally(parts, world, state, cohort))

    return train(simulation.world, state)


def alone(
    simulation: Simulation, state: FedState, keys: Array, queues_s: Array, tails: Array, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latency and sent bits `[P, Q, rounds]` by the fading and cohorts of keys `[P]`, from first queues `[Q]`.

    Nothing is trained: the tail energies `[C, R + 1]` stay.
    """
    parts = simulation.parts

    def run(world: World, state: FedState, key: Array, queue_s: Array) -> tuple[Array, Array]:
        state = dataclasses.replace(state, key=key)

        def one(state: FedState, number: Array) -> tuple[FedState, tuple[Array, Array]]:
            keys = round_keys(state.key, number)
            link = parts.link.step(state.link, keys.channel, jnp.arange(world.data.count.shape[0]))
            state = dataclasses.replace(state, link=link)
            cohort = choose_cohort(parts, world, state, keys)
            here, weight = cohort.present, parts.client_weight(cohort.clients.examples)
            untrained = Local(
                trained=cast(Trained, None), shown=cast(Adapters, None), finite=here, active=here, weight=weight
            )
            decision = control(parts, state, cohort, untrained, tails)

            def bits_of(keep_ratio: Array, ranks: Array) -> Array:
                return parts.sparsifier.payload_bits(keep_ratio, cohort.scope(ranks))

            bits = jax.vmap(bits_of)(decision.keep_ratio, cohort.ranks) * here
            delivery = parts.link.deliver(cohort.link, bits, decision, cohort.start_s, here)
            latency_s = round_latency(delivery, here)
            state = dataclasses.replace(state, queue_s=parts.controller.update_queue(state.queue_s, latency_s))
            return state, (latency_s, jnp.sum(jnp.where(jnp.isfinite(delivery.latency_s), bits, 0.0)))

        return lax.scan(one, dataclasses.replace(state, queue_s=queue_s), jnp.arange(rounds))[1]

    every = jax.jit(jax.vmap(jax.vmap(run, (None, None, None, 0)), (None, None, 0, None)))
    latency_s, bits = every(simulation.world, state, keys, queues_s)
    return np.asarray(latency_s, np.float64), np.asarray(bits, np.float64)


def fit_queue(overrides: list[str], budget_s: float) -> dict:
    """Where the queue of TSFA starts, and the mean latency of the controller alone, over the budget."""
    config = load_config(None, overrides)
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    trained, _ = simulation.run(state, PRACTICE_ROUNDS)
    tails, state = tail_energies(simulation, trained), simulation.init(jax.random.key(config.seed))
    queues = QUEUES * budget_s
    others = jax.random.split(jax.random.fold_in(state.key, config.rounds), ELSEWHERE)
    paths = jnp.concatenate([state.key[None], others])
    over = alone(simulation, state, paths, jnp.float32(queues), tails, config.rounds)[0].mean(2) / budget_s
    best, foreseen = (int(np.argmin(np.abs(mean - 1))) for mean in (over[0], over[1:].mean(0)))
    return {
        "queue_s": float(queues[best]),
        "latency_over_budget": float(over[0, best]),
        "from_zero": float(over[0, 0]),
        "foreseen": float(over[0, foreseen]),
        "foreseen_queue_s": float(queues[foreseen]),
        "foreseen_elsewhere": over[1:, foreseen].tolist(),
    }


def measure_cell(files: list[str], seed: int) -> dict:
    """What a seed's runs share: the budget, what dense sends, and where the queue of TSFA starts."""
    shared = [*files, *SETTING, f"seed={seed}"]
    config = load_config(None, [*shared, "sparsifier.name=dense", "control.name=fixed"])
    simulation = build(config)
    state = simulation.init(jax.random.key(seed))
    nothing = jnp.zeros((simulation.parts.cohort_size, config.lora.max_rank + 1))
    latency_s, bits = alone(simulation, state, state.key[None], jnp.zeros(1), nothing, config.rounds)
    budget_s = float(np.mean(latency_s)) / 4
    tsfa = {
        f"{sparsifier} {name}": fit_queue([*shared, *SPARSIFIERS[sparsifier], *controller(name, budget_s)], budget_s)
        for sparsifier in SPARSIFIERS
        for name in LIMITS
    }
    return {
        "dense_latency_s": latency_s[0, 0].tolist(),
        "dense_uplink_bits": int(bits.sum()),
        "budget_s": budget_s,
        "tsfa": tsfa,
    }


def measure(overrides: list[str], cell: dict) -> dict:
    """One run: its evaluations over simulated time, and how it kept the budget."""
    config = load_config(None, overrides)
    simulation = build(config)
    state = simulation.init(jax.random.key(config.seed))
    first_queue_s = float(state.queue_s)
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
        "partition_hash": simulation.partition_hash,
    }


def run_seed(title: str) -> str:
    """The seed in a run's title."""
    return title.rsplit(" ", 1)[1]


def summarize(runs: dict[str, dict], cells: dict[str, dict]) -> dict[str, dict]:
    """Means over the seeds that have ended, the distance of the accuracy from `ideal`, and how the budget was kept."""
    table, runs = {}, {key: run for key, run in runs.items() if run_seed(key) in cells}
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
        "queues": QUEUES.tolist(),
        "elsewhere": ELSEWHERE,
        "practice_rounds": PRACTICE_ROUNDS,
    }
    cells = kept.get("cells", {}) if kept.get("made_with") == made_with else {}
    runs = kept.get("runs", {})
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> dict:
        result = {
            "made_with": made_with,
            "environment": environment,
            "table": summarize(runs, cells),
            "cells": cells,
            "runs": runs,
        }
        options.out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        return result

    plan = [(seed, s, name) for seed in map(str, range(options.seeds)) for s in SPARSIFIERS for name in CONTROLLERS]
    for seed, sparsifier, name in plan:
        title = f"{sparsifier} {name} seed {seed}"
        if options.only not in title:
            continue
        if seed not in cells:
            cells[seed] = measure_cell(files, int(seed))
            common.note(f"cell of seed {seed}: {cells[seed]}")
            write()
        cell = cells[seed]
        queue_s = cell["tsfa"][f"{sparsifier} {name}"]["queue_s"] if name in LIMITS else 0.0
        chosen = controller(name, cell["budget_s"], queue_s)
        overrides = [*SETTING, *SPARSIFIERS[sparsifier], *chosen, f"seed={seed}"]
        if runs.get(title, {}).get("overrides") != overrides:
            found = measure([*files, *overrides], cell)
            runs[title] = {"overrides": overrides, "git_commit": environment["git_commit"], **found}
            common.note(f"{title}: {runs[title]}")
            write()
    print(json.dumps(write()["table"], indent=2))


if __name__ == "__main__":
    main()
