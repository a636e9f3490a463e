"""A run on the devices at hand, told as JSON: `run_here.py TRIALS SETTING ...`.

Of the run: its losses. Of each frozen weight: the share that the first device holds. Of the compiled program: elements
of each result of an all-gather and of an all-reduce, and the bytes of its arguments on a device.
"""

import json
import math
import re
import sys
from typing import Any

import jax

import fedjax_lora as fl


def told(settings: list[str], trials: int) -> dict[str, Any]:
    """What `settings` come to; of so many trials side by side where there are several."""
    simulation = fl.build(fl.load_config(None, settings))
    if trials > 1:
        return {"eval_loss": losses(simulation, trials)}
    state = simulation.init(jax.random.key(0))
    compiled = simulation.program.compiled(simulation.world, state)
    _, metrics = simulation.run(state, 2)
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    return {
        "train_loss": metrics.train_loss.tolist(),
        "eval_loss": metrics.eval_loss.tolist(),
        "held": held(simulation.world.base),
        "gathered": exchanged(text, "all-gather"),
        "summed": exchanged(text, "all-reduce"),
        "argument_bytes": analysis.argument_size_in_bytes,
    }


def losses(simulation: fl.Simulation, trials: int) -> list[float]:
    """Of trials that differ in their seeds alone, after a round."""
    from fedjax_lora.sim.trials import Lanes, Trial

    data = simulation.world.data
    each = [Trial(simulation.numbers, seed, data.index, data.count) for seed in range(trials)]
    lanes = Lanes(simulation, trials)
    for _, rows in lanes.segments(each, lanes.init(each), 1):
        return [float(row.eval_loss[-1]) for row in rows]
    raise AssertionError("no segment")


def held(base: Any) -> dict[str, float]:
    """Path of each frozen weight -> the share of it that the first device holds."""

    def share(leaf: jax.Array) -> float:
        return leaf.addressable_shards[0].data.size / leaf.size

    leaves = jax.tree_util.tree_leaves_with_path(base)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): share(leaf) for path, leaf in leaves}


def exchanged(text: str, operation: str) -> list[int]:
    """Elements of each array that an operation of this name results in, in a compiled program."""
    results = re.findall(rf"= ([^=]*?) {operation}(?:-start)?\(", text)
    shapes = [shape for result in results for shape in re.findall(r"[a-z0-9]+\[([0-9,]*)\]", result)]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


if __name__ == "__main__":
    json.dump(told(sys.argv[2:], int(sys.argv[1])), sys.stdout)
