"""One run, start to end, in a folder: build, restore, advance, log, checkpoint, report."""

import importlib.metadata
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fedjax_lora import __version__, trees
from fedjax_lora.build import build
from fedjax_lora.config import ExperimentConfig, dump
from fedjax_lora.io import checkpoint
from fedjax_lora.io.log import RunFolder, read_metrics, read_summary
from fedjax_lora.io.plan import Plan, effects_of_run
from fedjax_lora.progress import Progress
from fedjax_lora.report.html import write_report
from fedjax_lora.sim.engine import Simulation


def run(
    config: ExperimentConfig, path: Path, resume: bool, console: Console, plan: Plan | None = None
) -> dict[str, Any]:
    """Run an experiment to its last round, or continue it from its last checkpoint.

    The program is built, compiled and evaluated once before the folder is made: a mistake in the configuration
    leaves nothing behind. Times in the summary are those of the last session of a resumed run. With the plan that the
    configuration has taken, the summary names it, and the effects on its bound under the errors of the run.

    Returns:
      The summary, as in `summary.json`; that of a run that has ended already stays as it is.

    Raises:
      ValueError: the folder is in use, or cannot be resumed with this configuration, these weights or these data.
    """
    with Progress(console) as progress:
        return _run(config, path, resume, progress, plan)


def _run(config: ExperimentConfig, path: Path, resume: bool, progress: Progress, plan: Plan | None) -> dict[str, Any]:
    started = time.perf_counter()
    if resume:
        RunFolder.check_configuration(path, dump(config))
        if (ended := read_summary(path)) is not None and ended["rounds"] == config.rounds:
            write_report([path], RunFolder(path).report)
            return ended
    else:
        RunFolder.check_free(path)
    progress.stage("reading the model and the data")
    simulation = build(config)
    for note in _notes(config, simulation):
        progress.print(f"note: {note}")
    progress.stage("compiling a round")
    state = simulation.init(jax.random.key(config.seed))
    _, initial_accuracy = simulation.evaluate(state)
    data = {name: getattr(simulation, name) for name in ("examples_hash", "partition_hash", "base_hash")}
    folder = (RunFolder.resume if resume else RunFolder.create)(path, dump(config), data)
    if resume:
        state = checkpoint.restore(folder.checkpoints, state) or state
        folder.truncate(int(state.round))
    done = int(state.round)
    progress.print(
        f"{config.clients.count} clients, {simulation.parts.cohort_size} a round, "
        f"{simulation.parts.chunk} at once; compiled in {simulation.compile_s:.1f} s; "
        f"accuracy before: {initial_accuracy:.4f}"
    )

    training_started = time.perf_counter()
    for state, metrics in progress.rounds(simulation.segments(state, config.rounds - done), done, config.rounds):
        folder.append(metrics)
        checkpoint.save(folder.checkpoints, state)
    training_s = time.perf_counter() - training_started
    progress.stage("writing the report")

    planned = {}
    if plan:
        effects = effects_of_run(plan, read_metrics(folder.path))
        planned = {"plan": plan.taken, "bound_effects": effects._asdict()}
    summary = folder.write_summary(
        {
            "initial_accuracy": initial_accuracy,
            "wall_s": time.perf_counter() - started,
            "compile_s": simulation.compile_s,
            "samples_per_s": _samples(config, simulation, config.rounds - done) / training_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "device": device_name(),
            "versions": versions(),
            "seed": config.seed,
            "partition_hash": simulation.partition_hash,
            **planned,
        }
    )
    write_report([path], folder.report)
    return summary


def _notes(config: ExperimentConfig, simulation: Simulation) -> list[str]:
    """What a user should know of this run beforehand."""
    notes = []
    if simulation.truncated:
        notes.append(f"{simulation.truncated} sentences were cut to data.max_length = {config.data.max_length} tokens")
    state = jax.eval_shape(simulation.init, jax.random.key(config.seed))
    for what, tree in (("what the clients keep", state.clients), ("what is merged into the base", state.merged)):
        if (size := trees.num_bytes(tree)) > 8 * config.clients.count:  # more than a rank each
            notes.append(f"{what} takes {size / 1e6:,.2f} MB of memory")
    return notes


def _samples(config: ExperimentConfig, simulation: Simulation, rounds: int) -> int:
    """Places in the batches that were trained on."""
    return rounds * simulation.parts.cohort_size * config.local.steps * config.local.batch_size


def peak_memory_bytes() -> int:
    """The most memory that the accelerator, or on a CPU this process, has held."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name() -> str:
    """Kind and number of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def versions() -> dict[str, str]:
    """What decides about a result's last digits."""
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"fedjax-lora": __version__, "python": platform.python_version(), **found}
