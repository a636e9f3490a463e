"""A run that is on disk, back in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedjax_lora.app.runner import started_with
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import FedState
from fedjax_lora.io import checkpoint
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import CONFIG, check_config, read_data, read_metrics
from fedjax_lora.sim.engine import Simulation


class Run(NamedTuple):
    """What a folder holds.

    simulation: built anew from its configuration. state: of its newest checkpoint.
    metrics: field of `metrics.jsonl` -> `[rounds, ...]`, NaN for null; up to the round of the state.
    """

    simulation: Simulation
    state: FedState
    metrics: dict[str, np.ndarray]


def load_run(folder: str | Path, methods: Sequence[Method] = ()) -> Run:
    """The run that a folder holds, ended or not.

    Args:
      folder: of the run.
      methods: a user's own that it was started with; a folder is data, and no code that it names is executed.

    Raises:
      ValueError: the folder is damaged, holds no checkpoint that is whole, or its model or data are others now.
      ConfigError: its configuration names a method that is not at hand.

    Example:
      >>> run = fl.load_run("runs/digits")  # doctest: +SKIP
      >>> run.metrics["eval_accuracy"][-1]  # doctest: +SKIP
    """
    check_config(folder)
    if (files := read_data(folder).get("methods")) and not methods:
        raise ValueError(f"methods must be those of {', '.join(files)}, with which {folder} was started, got none")
    config = load_config(Path(folder) / CONFIG, methods=methods)
    simulation, on_disk = build(config, methods), RunFolder(folder)
    on_disk.check_data(started_with(simulation.facts))
    found = on_disk.last_checkpoint()
    if found is None:
        raise ValueError(f"{folder} must hold a checkpoint to load, got none that is whole")
    state = checkpoint.restore(found, simulation.init(jax.random.key(config.seed)))
    lines = read_metrics(folder)[: found.step]
    fields = {name: np.array([line[name] for line in lines], dtype=float) for name in lines[0]}
    return Run(simulation, state, fields)
