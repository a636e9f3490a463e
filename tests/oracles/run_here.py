"""A run on the devices at hand, told as JSON: `run_here.py SETTING ...`.

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


def told(settings: list[str]) -> dict[str, Any]:
    """What two rounds by these settings come to."""
    simulation = fl.build(fl.load_config(None, settings))
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
    json.dump(told(sys.argv[1:]), sys.stdout)
