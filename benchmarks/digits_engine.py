"""This project's side of `client_overhead.py`: rounds of the digits preset as `build` makes it, one round a call."""

import time
import warnings
from typing import Any

import jax
import numpy as np
from common import peak_memory_bytes
from engine import Rounds

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.data.sources import arrays
from fedjax_lora.sim.cohort import use_cpu_cores


class DigitsEngine(Rounds):
    """A simulation of the round, compiled: dense sparsifier, ideal control, plain averaging.

    Args:
      data: file of the pool; every client holds exactly the examples that its steps read.
      clients, steps, batch, learning_rate: of the round.
    """

    def __init__(self, data: str, clients: int, steps: int, batch: int, learning_rate: float):
        use_cpu_cores()
        warnings.simplefilter("ignore")  # no matter here: how much a model without pre-training learns
        started = time.perf_counter()
        with np.load(data) as file:
            pool = {"image": file["image"][..., None], "label": file["label"]}
        two = {name: value[:2] for name, value in pool.items()}
        method = arrays("pool", train=pool, test=two, class_names=[str(digit) for digit in range(10)])
        overrides = [
            "data.source=pool",
            f"clients.count={clients}",
            "clients.partition.kind=iid",
            f"local={{steps: {steps}, batch_size: {batch}}}",
            f"local.optimizer={{name: adamw, learning_rate: {learning_rate}}}",
            "engine={eval_every: 1, eval_batch_size: 2}",
        ]
        config = load_config(None, overrides, base=preset("digits-ideal"), methods=[method])
        self._simulation = build(config, [method])
        self._state = self._simulation.init(jax.random.key(0))
        self._setup_s = time.perf_counter() - started
        self._simulation.compile(self._state)

    def describe(self) -> dict[str, Any]:
        """Settings, and the times that a run pays once."""
        counts = np.asarray(self._simulation.world.data.count)
        return {
            **super().describe(),
            "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(self._state.adapters)),
            "examples_of_a_client": [int(counts.min()), int(counts.max())],
        }

    def peak_memory_bytes(self) -> int:
        """The most that this process has held."""
        return peak_memory_bytes()
