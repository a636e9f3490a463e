"""This project's side of `population.py`: rounds of the digits preset with a population that is sampled."""

import time
import warnings
from typing import Any

import jax
from common import peak_memory_bytes

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.core import trees
from fedjax_lora.sim.cohort import use_cpu_cores


class Populated:
    """A simulation of the digits preset, compiled.

    Args:
      clients: in all. cohort: of a round. examples: that each client draws.
      turn: rounds between evaluations. quick: a toy size, whose base has hardly been trained.
    """

    def __init__(self, clients: int, cohort: int, examples: int, turn: int, quick: bool):
        use_cpu_cores()
        warnings.simplefilter("ignore")  # no matter here: what a base that was hardly trained learns
        started = time.perf_counter()
        overrides = [
            f"clients={{count: {clients}, per_round: {cohort}}}",
            f"clients.partition={{kind: sampled, examples: {examples}}}",
            f"engine.eval_every={turn}",
            "rounds=1000",
            *(["pretrain.steps=2", "local.steps=2", "lora.targets=[query]"] if quick else []),
        ]
        self._simulation = build(load_config(None, overrides, base=preset("digits")))
        self._state = jax.block_until_ready(self._simulation.init(jax.random.key(0)))
        self._setup_s = time.perf_counter() - started
        self._accuracy = 0.0
        self._simulation.compile(self._state)

    def rounds(self, number: int) -> float:
        """Seconds that so many rounds took, with the evaluation at their end."""
        started = time.perf_counter()
        self._state, metrics = self._simulation.run(self._state, number)
        self._accuracy = float(metrics.eval_accuracy[-1])
        return time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """Sizes, and the times that a run pays once."""
        state = self._state
        return {
            "clients": state.clients.rank.shape[0],
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "client_chunk": self._simulation.layout.chunk,
            "setup_s": self._setup_s,
            "compile_s": self._simulation.compile_s,
            "rounds": int(state.round),
            "accuracy": self._accuracy,
            "state_of_clients_bytes": trees.num_bytes((state.clients, state.methods["wireless"])),
            "peak_memory_bytes": peak_memory_bytes(),
        }
