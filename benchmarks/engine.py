"""This project's side of a benchmark: the engine as `build` makes it, one round a call."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from common import ALPHA, LEARNING_RATE, MATMUL_SIZE, RANK, TARGETS, Dtype, Workload, peak_memory_bytes

from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.control.fixed import FixedConfig
from fedjax_lora.control.ideal import IdealConfig
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import FedState
from fedjax_lora.data.batches import local_batches
from fedjax_lora.data.partition import ClientsConfig, PartitionConfig
from fedjax_lora.data.sources import DataConfig
from fedjax_lora.models.load import ModelConfig
from fedjax_lora.sim.cohort import use_cpu_cores
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sparsifiers.dense import DenseConfig
from fedjax_lora.sparsifiers.soft import SoftConfig
from fedjax_lora.training.local import LocalConfig
from fedjax_lora.training.optimizers import OptimizerConfig


class Rounds:
    """A compiled simulation, one round a call; who inherits makes it."""

    _simulation: Simulation
    _state: FedState
    _setup_s: float

    def describe(self) -> dict[str, Any]:
        """Settings, and the times that a run pays once."""
        return {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "client_chunk": self._simulation.layout.chunk,
            "setup_s": self._setup_s,
            "compile_s": self._simulation.compile_s,
        }

    def round(self) -> tuple[float, float]:
        """Seconds that one round took, and its training loss."""
        started = time.perf_counter()
        self._state, metrics = self._simulation.run(self._state, 1)
        return time.perf_counter() - started, float(metrics.train_loss[0])


class Engine(Rounds):
    """A simulation of the workload, compiled.

    Args:
      workload: what a round computes; every client holds exactly the sentences that its steps read.
      folder: where `workload.write` put them.
      dtype: of the frozen matrices and their products.
      client_chunk: clients trained at once.
      wireless: False is plain federated averaging over a network without cost: nothing is left out, which is the
        peer's arithmetic. True adds SOFT at half of the ranks and a simulated cell.
      **model: further options of the model.
    """

    def __init__(
        self,
        workload: Workload,
        folder: Path,
        dtype: Dtype,
        client_chunk: int | Literal["auto"],
        wireless: bool,
        **model: Any,
    ):
        os.environ["FEDJAX_LORA_CACHE"] = str(folder)
        use_cpu_cores()
        started = time.perf_counter()
        self._workload = workload
        self._dtype = dtype
        data, methods = self._data(folder)
        config = ExperimentConfig(
            model=ModelConfig(pretrained=workload.model, compute_dtype=dtype, **model),
            lora=LoraConfig(max_rank=RANK, rank=RANK, alpha=ALPHA, targets=TARGETS),
            data=data,
            clients=ClientsConfig(count=workload.clients, partition=PartitionConfig(kind="iid")),
            local=LocalConfig(
                steps=workload.steps,
                batch_size=workload.batch,
                optimizer=OptimizerConfig(name="adamw", learning_rate=LEARNING_RATE),
            ),
            sparsifier=SoftConfig() if wireless else DenseConfig(),
            control=FixedConfig(keep_ratio=0.5) if wireless else IdealConfig(),
            engine=EngineConfig(client_chunk=client_chunk, eval_every=1, eval_batch_size=2),
        )
        self._simulation = build(config, methods)
        self._state = self._simulation.init(jax.random.key(0))
        self._setup_s = time.perf_counter() - started
        self._simulation.compile(self._state)
        if workload.text is None and not np.all(self.tokens()[1]):
            raise RuntimeError(
                "a sentence does not fill its length: the tokenizer splits words otherwise than foreseen"
            )

    def _data(self, folder: Path) -> tuple[Any, Sequence[Method]]:
        """Options of the data, and the methods beside the package's own."""
        files = {"train": str(self._workload.train_file(folder)), "test": str(self._workload.test_file(folder))}
        return DataConfig(source="tsv", max_length=self._workload.length, **files), ()

    def adapters(self) -> dict[str, np.ndarray]:
        """Global factors and head by name, as in `base.Adapters`."""
        held = self._state.adapters
        factors = {f"{name}/{part}": getattr(f, part) for name, f in held.modules.items() for part in ("a", "b")}
        head = {f"head/{leaf}": value for leaf, value in held.head.items()}
        return jax.tree.map(np.asarray, factors | head)

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """`[N, S]` each: tokens of the training pool, and 1 where they are real."""
        pool = self._simulation.world.data.train
        return np.asarray(pool["input_ids"]), np.asarray(pool["attention_mask"])

    def labels(self) -> np.ndarray:
        """`[N]` labels of the training pool."""
        return np.asarray(self._simulation.world.data.train["label"])

    def rows(self) -> np.ndarray:
        """`[clients, steps, batch]` rows of the pool that the next round will read."""
        data, shape = self._simulation.world.data, self._workload
        keys = client_keys(round_keys(self._state.key, self._state.round).local, jnp.arange(shape.clients))

        def of_client(key: jax.Array, index: jax.Array, count: jax.Array) -> jax.Array:
            order_key, _ = jax.random.split(key)
            return local_batches(order_key, index, count, shape.steps, shape.batch)[0]

        return np.asarray(jax.jit(jax.vmap(of_client))(keys, data.index, data.count))

    def matmul_gflops(self) -> float:
        """Best rate of a large matrix product in the dtype of the frozen matrices."""
        x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), self._dtype)
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - started)
        return 2e-9 * MATMUL_SIZE**3 / best

    def peak_memory_bytes(self) -> int:
        """The most that the accelerator, or on a CPU this process, has held."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", peak_memory_bytes())
