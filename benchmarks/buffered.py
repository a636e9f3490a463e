"""Simulated seconds to an accuracy: rounds beside buffered steps of the server, over the same fading channels.

Run as `python benchmarks/buffered.py --figure docs/buffered.png`: 1,000 clients of the digits preset, of whom 100 run
at once. In rounds the server waits for all of them; buffered, it takes the first 20. Both have as many client updates,
and share the band as suits them: for the least latency of a round, or alike, so that who is heard well ends first.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import emit, environment, note, peak_memory_bytes

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.sim.cohort import use_cpu_cores

COLOURS = {"synchronous": "#334155", "buffered": "#f97316"}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="in all (%(default)s)")
    parser.add_argument("--at-once", type=int, default=100, help="clients that run at once (%(default)s)")
    parser.add_argument("--buffer", type=int, default=20, help="updates of a buffered step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of all who run at once (%(default)s)")
    parser.add_argument("--target", type=float, default=0.90, help="accuracy (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a toy size")
    parser.add_argument("--figure", metavar="PNG", type=Path, help="draw both runs there")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.at_once, options.buffer, options.rounds = 8, 4, 2, 2
    use_cpu_cores()
    warnings.simplefilter("ignore")
    buffered = f"arrival={{name: buffered, buffer: {options.buffer}}}", "control={name: uniform, keep_ratio: 0.25}"
    ways = {"synchronous": (options.at_once, ()), "buffered": (options.buffer, buffered)}
    runs = {}
    for name, (updates, overrides) in ways.items():
        note(name)
        runs[name] = run(overrides, updates, options)
    made_with = {key: value for key, value in vars(options).items() if key not in ("figure", "out")}
    result = {"benchmark": "buffered", "environment": environment(), "made_with": made_with, "runs": runs}
    reached = [runs[name]["seconds_to_target"] for name in COLOURS]
    result["times_as_fast_to_target"] = reached[0] / reached[1] if all(reached) else None
    if options.figure is not None:
        draw(runs, options.target, options.figure)
    emit(result, options.out)


def run(way: Sequence[str], updates: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run, with as many client updates as the other; an evaluation at each whole round's worth of them."""
    steps = options.at_once // updates
    overrides = [
        f"rounds={options.rounds * steps}",
        f"clients={{count: {options.clients}, per_round: {options.at_once}}}",
        "clients.partition={kind: sampled, examples: 32}",
        *way,
        f"engine.eval_every={steps}",
        *(["pretrain.steps=2", "local.steps=2", "lora.targets=[query]"] if options.quick else []),
    ]
    simulation = build(load_config(None, overrides, base=preset("digits")))
    state = simulation.init(jax.random.key(0))
    simulation.compile(state)
    started = time.perf_counter()
    _, metrics = simulation.run(state, options.rounds * steps)
    wall_s = time.perf_counter() - started
    told = np.flatnonzero(~np.isnan(metrics.eval_accuracy))
    taken = np.cumsum(metrics.participants)
    rows = [
        {
            "simulated_s": float(metrics.elapsed_s[at]),
            "accuracy": float(metrics.eval_accuracy[at]),
            "updates": int(taken[at]),
        }
        for at in told
    ]
    staleness = metrics.methods.get("arrival/staleness")
    return {
        "rows": rows,
        "seconds_to_target": next((row["simulated_s"] for row in rows if row["accuracy"] >= options.target), None),
        "mean_staleness": 0.0 if staleness is None else float(np.nanmean(staleness)),
        "client_updates": int(taken[-1]),
        "client_updates_per_s": float(taken[-1] / wall_s),
        "wall_s": wall_s,
        "compile_s": simulation.compile_s,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def draw(runs: dict[str, Any], target: float, path: Path) -> None:
    """Accuracy over simulated time, and over client updates; a circle is where a run first reaches the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    axes = {"simulated_s": "simulated time, s", "updates": "client updates"}
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, (key, label) in zip(panels, axes.items(), strict=True):
        for name, found in runs.items():
            x, y = ([row[what] for row in found["rows"]] for what in (key, "accuracy"))
            panel.plot(x, y, color=COLOURS[name], label=name)
            first = next((at for at, accuracy in enumerate(y) if accuracy >= target), None)
            if first is not None:
                panel.plot(x[first], y[first], "o", color=COLOURS[name])
        panel.set_xlabel(label)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xscale("log")
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
