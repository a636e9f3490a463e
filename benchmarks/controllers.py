"""Controllers under one latency budget, on SST-2 with MiniLM; prints JSON and resumes where it stopped.

The setting is that of `sst2_accuracy.py`, in the default cell. A seed is a cell of its own: its budget is a quarter of
the mean latency of dense uploads over the run's own channel, with shares of least latency. `uniform` and `fixed` send a
quarter of the ranks, `ideal` all of them without a network; `greedy` and `tsfa` choose.

TSFA's V is `V_PER_BUDGET` times the budget squared: it has the unit s^2, so one number serves every cell. Its queue
starts near where it settles: at the mean queue of the controller alone over `SETTLING_ROUNDS` rounds of the same cell,
with fading of other keys than the run's and the tail energies of one round of training.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from sst2_accuracy import SETTING

from fedjax_lora import Simulation, build, load_config, use_cpu_cores
from fedjax_lora.base import Adapters, FedState
from fedjax_lora.prng import round_keys
from fedjax_lora.sim.parts import Local
from fedjax_lora.sim.round import choose_cohort, control, round_latency, train_locally

V_PER_BUDGET = 1.0
SETTLING_ROUNDS = 2000
EVAL_EVERY = 2

SPARSIFIERS = {
    "soft": ["sparsifier.name=soft"],
    "soft_rotated": ["sparsifier.name=soft_rotated", "sparsifier.keep_norm=true"],
}
CONTROLLERS = ("ideal", "tsfa", "uniform", "fixed", "greedy")


def tsfa(budget_s: float, queue_s: float) -> list[str]:
    """TSFA under a budget."""
    return [
        "control.name=tsfa",
        f"control.latency_budget_s={budget_s}",
        f"control.V={V_PER_BUDGET * budget_s**2}",
        f"control.queue_s={queue_s}",
    ]


def controller(name: str, budget_s: float, queue_s: float) -> list[str]:
    """The overrides of one of CONTROLLERS."""
    if name == "tsfa":
        return tsfa(budget_s, queue_s)
    chosen = {
        "ideal": [],
        "uniform": ["control.keep_ratio=0.25"],
        "fixed": ["control.keep_ratio=0.25"],
        "greedy": [f"control.latency_budget_s={budget_s}"],
    }
    return [f"control.name={name}", *chosen[name]]


def tail_energies(simulation: Simulation, state: FedState) -> Array:
    """`[C, R + 1]` of the cohort of round 1 after its local training."""
    parts = simulation.parts

    @jax.jit
    def train(world: Any, state: FedState) -> Array:
        cohort = choose_cohort(parts, world, state, round_keys(state.key, state.round))
        shown = train_locally(parts, world, state, cohort).shown

        def tail(shown: Adapters, ranks: Array) -> Array:
            return parts.sparsifier.tail_energy(cohort.start, shown, cohort.scope(ranks))

        return jax.vmap(tail)(shown, cohort.ranks)

    return train(simulation.world, state)


def alone(simulation: Simulation, state: FedState, tails: Array, key: Array, rounds: int) -> tuple[Array, Array, Array]:
    """Latency, queue and planned bits of `rounds` rounds, `[rounds]` each, without training: `tails` `[C, R + 1]` stay.

    With the state's own key the channel and the cohorts are those of the run.
    """
    parts = simulation.parts
    parts = parts._replace(sparsifier=parts.sparsifier._replace(tail_energy=lambda start, tail, scope: tail))

    @jax.jit
    def run(world: Any, state: FedState) -> tuple[Array, Array, Array]:
        def one(state: FedState, number: Array) -> tuple[FedState, tuple[Array, Array, Array]]:
            keys = round_keys(key, number)
            link = parts.link.step(state.link, keys.channel, jnp.arange(world.data.count.shape[0]))
            state = dataclasses.replace(state, link=link)
            cohort = choose_cohort(parts, world, state, keys)
            here, weight = cohort.present, parts.client_weight(cohort.clients.examples)
            untrained = Local(trained=None, shown=tails, finite=here, active=here, weight=weight)  # type: ignore
            decision = control(parts, state, cohort, untrained)

            def bits_of(keep_ratio: Array, ranks: Array) -> Array:
                return parts.sparsifier.payload_bits(keep_ratio, cohort.scope(ranks))

            bits = jax.vmap(bits_of)(decision.keep_ratio, cohort.ranks) * here
            delivery = parts.link.deliver(cohort.link, bits, decision, cohort.start_s, here)
            latency_s = round_latency(delivery, here)
            state = dataclasses.replace(state, queue_s=parts.controller.update_queue(state.queue_s, latency_s))
            return state, (latency_s, state.queue_s, bits.sum())

        return lax.scan(one, state, jnp.arange(rounds))[1]

    return run(simulation.world, state)


def measure_cell(files: list[str], seed: int) -> dict:
    """What a seed's runs share: the budget, what dense sends, and where the queue of TSFA starts."""
    shared = [*files, *SETTING, f"seed={seed}"]
    config = load_config(None, [*shared, "sparsifier.name=dense", "control.name=fixed"])
    simulation = build(config)
    state = simulation.init(jax.random.key(seed))
    nothing = jnp.zeros((simulation.parts.cohort_size, config.lora.max_rank + 1))
    latency_s, _, bits = alone(simulation, state, nothing, state.key, config.rounds)
    budget_s = float(np.mean(latency_s)) / 4
    queue_s = {}
    for name, sparsifier in SPARSIFIERS.items():
        simulation = build(load_config(None, [*shared, *sparsifier, *tsfa(budget_s, 0.0)]))
        state = simulation.init(jax.random.key(seed))
        tails = tail_energies(simulation, state)
        _, queue, _ = alone(simulation, state, tails, jax.random.key(2**32 - 1 - seed), SETTLING_ROUNDS)
        queue_s[name] = float(np.mean(queue[SETTLING_ROUNDS // 2 :]))
    return {
        "dense_latency_s": np.asarray(latency_s).tolist(),
        "dense_uplink_bits": int(np.sum(np.asarray(bits, np.int64))),
        "budget_s": budget_s,
        "queue_s": queue_s,
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
        "bits_share_of_dense": int(bits[-1]) / cell["dense_uplink_bits"],
        "latency_over_budget": float(np.mean(metrics.latency_s, dtype=np.float64)) / cell["budget_s"],
        "queue_s": {"first": first_queue_s, "final": float(metrics.queue_s[-1])},
        "latency_s": metrics.latency_s.tolist(),
        "keep_ratio_mean": metrics.keep_ratio_mean.tolist(),
        "rows": rows,
        "partition_hash": simulation.partition_hash,
    }


def summarize(runs: dict[str, dict]) -> dict[str, dict]:
    """Means over the seeds that have ended, and the distance of the accuracy from `ideal`."""
    table = {}
    for sparsifier in SPARSIFIERS:
        for name in CONTROLLERS:
            mine = {key: run for key, run in runs.items() if key.startswith(f"{sparsifier} {name} seed ")}
            ideal = {key: runs.get(key.replace(f" {name} ", " ideal ")) for key in mine}
            apart = [
                run["accuracy"] - best["accuracy"]
                for run, best in zip(mine.values(), ideal.values(), strict=True)
                if best
            ]
            if mine:
                table[f"{sparsifier} {name}"] = {
                    "seeds": len(mine),
                    "accuracy_mean": statistics.mean(run["accuracy"] for run in mine.values()),
                    "accuracy_over_ideal": statistics.mean(apart) if apart else None,
                    "bits_share_of_dense": statistics.mean(run["bits_share_of_dense"] for run in mine.values()),
                    "latency_over_budget": [run["latency_over_budget"] for run in mine.values()],
                    "elapsed_s": [run["rows"][-1]["elapsed_s"] for run in mine.values()],
                }
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
    use_cpu_cores()
    files = [f"model.pretrained={common.model_folder(options.model)}"]
    files += [f"data.train={options.train}", f"data.test={options.test}"]
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    setting = [*SETTING, f"engine.eval_every={EVAL_EVERY}"]
    made_with = {"setting": setting, "sparsifiers": SPARSIFIERS, "V_per_budget": V_PER_BUDGET}
    cells = kept.get("cells", {}) if kept.get("made_with") == made_with else {}
    runs = kept.get("runs", {})
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> dict:
        result = {
            "made_with": made_with,
            "environment": common.environment(),
            "table": summarize(runs),
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
        overrides = [
            *setting,
            *SPARSIFIERS[sparsifier],
            *controller(name, cell["budget_s"], cell["queue_s"][sparsifier]),
            f"seed={seed}",
        ]
        if runs.get(title, {}).get("overrides") != overrides:
            runs[title] = {"overrides": overrides, **measure([*files, *overrides], cell)}
            common.note(f"{title}: {runs[title]}")
            write()
    print(json.dumps(write()["table"], indent=2))


if __name__ == "__main__":
    main()
