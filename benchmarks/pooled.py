"""This project's side of `host_pool.py`: rounds on a synthetic pool of images, on the device or on the host."""

import gc
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import peak_memory_bytes
from numpy.lib.format import open_memmap

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.core import trees
from fedjax_lora.data import sources

CLASSES, SIDE, CHANNELS, AT_ONCE, TESTED = 10, 8, 16, 4096, 256


class Pooled:
    """A simulation of the digits preset's model and network on noise, compiled; its base has not been trained.

    Args:
      data: where the pool is. examples: of the pool, 4 KiB each.
      clients: in all, each of 32 examples. cohort: of a round. turn: rounds between evaluations.
    """

    def __init__(self, data: str, examples: int, clients: int, cohort: int, turn: int):
        warnings.simplefilter("ignore")  # no matter here: what a base that was not trained learns
        with tempfile.TemporaryDirectory() as folder:
            source = _noise(Path(folder), examples, mapped=data == "host")
            overrides = [
                "data.source=noise",
                f"clients={{count: {clients}, per_round: {cohort}}}",
                "clients.partition={kind: sampled, examples: 32}",
                f"engine.eval_every={turn}",
                f"engine.data={data}",
                "rounds=1000",
            ]
            self._simulation = build(load_config(None, overrides, base=preset("digits"), methods=[source]), [source])
        self._state = jax.block_until_ready(self._simulation.init(jax.random.key(0)))
        self._simulation.compile(self._state)

    def rounds(self, number: int) -> float:
        """Seconds that so many rounds took, with the evaluation at their end."""
        started = time.perf_counter()
        self._state, self._metrics = self._simulation.run(self._state, number)
        return time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """Bytes on the device and in the process: of its own, and of files that are mapped."""
        gc.collect()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, files = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "pool_bytes_on_each_device": trees.num_bytes(self._simulation.world.data.train),
            "own_memory_bytes": own,
            "mapped_memory_bytes": files,
            "peak_memory_bytes": peak_memory_bytes(),
            "train_loss": float(self._metrics.train_loss[-1]),
        }


def _noise(folder: Path, examples: int, mapped: bool) -> Any:
    """A source of images of noise, in memory or in a file that is mapped."""
    path, generator = folder / "image.npy", np.random.default_rng(0)
    image = open_memmap(path, "w+", np.float32, (examples, SIDE, SIDE, CHANNELS))
    for start in range(0, examples, AT_ONCE):
        part = image[start : start + AT_ONCE]
        part[:] = generator.random(part.shape, np.float32)
    image.flush()
    del image
    train = {
        "image": np.load(path, mmap_mode="r" if mapped else None),
        "label": generator.integers(CLASSES, size=examples),
    }
    test = {name: np.array(leaf[:TESTED]) for name, leaf in train.items()}
    return sources.arrays("noise", train=train, test=test, class_names=[str(label) for label in range(CLASSES)])
