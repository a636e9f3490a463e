"""Simulations of a given size for `compile_time.py` and `client_scaling.py`, each alone in a process.

JAX keeps no compiled program here, so that each process pays for its own.
"""

import ctypes
import dataclasses
import gc
import os
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from common import peak_memory_bytes

import fedjax_lora as fl
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.groups import grouped
from fedjax_lora.config.presets import preset
from fedjax_lora.core import trees
from fedjax_lora.core.learning import Model
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.data.sources import DataConfig, arrays, load
from fedjax_lora.models import bert
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.trials import Lanes

SHAPE = bert.BertConfig(vocab_size=1000, width=384, num_heads=12, mlp_width=1536, max_positions=64)
"""MiniLM's blocks under a short vocabulary."""

LENGTH = 32
EXAMPLES = 8
"""Tokens of a sentence, and examples that each client holds and takes in a step."""

TESTED = 16
"""Examples of an evaluation, which is inside every timed round: few, so that it costs little."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBertConfig(Options):
    """A BERT of random weights."""

    name: Literal["random-bert"] = "random-bert"
    num_layers: int = 2


def make_bert(options: RandomBertConfig, context: Context) -> Model:
    """The encoder of that depth."""
    config = dataclasses.replace(SHAPE, num_layers=options.num_layers)
    return bert.bert(config, context.made["task"], context.made["adapter"])


def sentences(count: int) -> dict[str, np.ndarray]:
    """So many random sentences without padding, of two classes in turn."""
    ids = np.random.default_rng(0).integers(SHAPE.vocab_size, size=(count, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": np.arange(count) % 2}


def digits(count: int) -> dict[str, np.ndarray]:
    """So many training digits, which repeat where there are fewer."""
    pool = load(DataConfig(source="digits")).train
    return {name: np.resize(leaf, (count, *leaf.shape[1:])) for name, leaf in pool.items()}


def device() -> str:
    """What programs are compiled for."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def keep_nothing(folder: Path) -> None:
    """Compile every program anew: JAX keeps none, and the package finds none in an empty folder."""
    os.environ["FEDJAX_LORA_CACHE"] = str(folder)
    jax.config.update("jax_enable_compilation_cache", False)


class Compiled:
    """The program of a run with a BERT of random weights, or of many runs side by side.

    Args:
      folder: an empty one.
      layers: of the model. rounds: of a segment. trials: at once; 0 is a run that is no trial.
    """

    def __init__(self, folder: Path, layers: int, rounds: int, trials: int):
        keep_nothing(folder)
        clients = 4
        source = arrays(
            "sentences", train=sentences(clients * EXAMPLES), test=sentences(TESTED), class_names=("no", "yes")
        )
        methods = (source, Method("model", "random-bert", RandomBertConfig, make_bert))
        overrides = [
            f"model={{name: random-bert, num_layers: {layers}}}",
            "data.source=sentences",
            f"clients={{count: {clients}, partition: {{kind: iid}}}}",
            f"local={{steps: 2, batch_size: {EXAMPLES}}}",
            f"engine={{client_chunk: 2, eval_every: {rounds}}}",
            f"rounds={rounds}",
        ]
        seeds = range(max(trials, 1))
        base = preset("digits")
        configs = [load_config(None, [*overrides, f"seed={seed}"], base=base, methods=methods) for seed in seeds]
        ((self._group,), _) = grouped(configs, methods)
        self._trials = trials

    def measure(self) -> dict[str, Any]:
        """Seconds of tracing and lowering, and of compiling; and lines of the program before and after XLA."""
        simulation = self._group.simulation
        if self._trials:
            lanes = Lanes(simulation, self._trials)
            arguments = lanes.stacked(self._group.trials), lanes.init(self._group.trials)
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            lowered = lanes.lower(*arguments)
        else:
            program = simulation.program
            segment = jax.jit(program.segment, donate_argnums=1, out_shardings=program.everywhere)
            state = jax.block_until_ready(simulation.init(jax.random.key(0)))
            started = time.perf_counter()
            lowered = segment.lower(simulation.world, state, jnp.int32(0))
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        return {
            "device": device(),
            "lower_s": lowered_at - started,
            "compile_s": time.perf_counter() - lowered_at,
            "stablehlo_lines": lowered.as_text().count("\n"),
            "compiled_lines": (compiled.as_text() or "").count("\n"),
        }


class Clients:
    """The digits preset's model with so many clients, who send everything over a network without cost.

    Args:
      folder: an empty one.
      clients: of each round. steps: local ones. chunk: clients trained at once. error_norms: whether they are measured.
    """

    def __init__(self, folder: Path, clients: int, steps: int, chunk: int, error_norms: bool):
        keep_nothing(folder)
        names = tuple(str(label) for label in range(10))
        source = arrays("repeated", train=digits(clients * EXAMPLES), test=digits(TESTED), class_names=names)
        overrides = [
            "data.source=repeated",
            f"clients={{count: {clients}, partition: {{kind: iid}}}}",
            f"local={{steps: {steps}, batch_size: {EXAMPLES}}}",
            "sparsifier=dense",
            "control=ideal",
            f"engine={{client_chunk: {chunk}, eval_every: 1, eval_batch_size: {TESTED}}}",
            f"engine.error_norms={str(error_norms).lower()}",
        ]
        config = load_config(None, overrides, base=preset("digits"), methods=[source])
        self._simulation: Simulation = fl.build(config, [source])
        self._state = self._simulation.init(jax.random.key(0))
        self._simulation.compile(self._state)
        self._held = 0

    def describe(self) -> dict[str, Any]:
        """Sizes, and what XLA says that the program of a round holds."""
        simulation, state = self._simulation, self._state
        return {
            "device": device(),
            "client_chunk": simulation.layout.chunk,
            "compile_s": simulation.compile_s,
            "adapter_bytes": trees.num_bytes(state.adapters),
            "data_bytes": trees.num_bytes(simulation.world.data),
            **xla_memory(simulation.program.compiled(simulation.world, state)),
        }

    def round(self) -> float:
        """Seconds of one round, its metrics on the host included."""
        started = time.perf_counter()
        self._state, _ = self._simulation.run(self._state, 1)
        jax.block_until_ready(self._state)
        return time.perf_counter() - started

    def forget_peak(self) -> None:
        """Give free memory back to the system, and begin anew to note the most memory that this process holds."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes VmRSS
        self._held = memory_bytes("VmRSS")

    def growth_bytes(self) -> int:
        """The most that this process has held since `forget_peak`, beyond what it held then."""
        return memory_bytes("VmHWM") - self._held

    def peak_memory_bytes(self) -> int:
        """The most that the accelerator, or on a CPU this process, has held."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", peak_memory_bytes())


def memory_bytes(field: str) -> int:
    """What Linux notes of this process's memory: VmRSS is what it holds, VmHWM the most that it has held."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * next(int(value.split()[0]) for name, _, value in lines if name == field)


def xla_memory(compiled: Any) -> dict[str, int]:
    """Bytes of a program on each device by XLA's own count; what it writes into its arguments is counted once."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    parts = {
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "alias_bytes": found.alias_size_in_bytes,
        "temp_bytes": found.temp_size_in_bytes,
    }
    return parts | {
        "xla_bytes": parts["argument_bytes"] + parts["output_bytes"] - parts["alias_bytes"] + parts["temp_bytes"]
    }
