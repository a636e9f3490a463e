"""One run, start to end, in a folder: build, restore, advance, log, checkpoint, report."""

import contextlib
import datetime
import importlib.metadata
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from fedjax_lora import __version__
from fedjax_lora.app.signals import Signals, heard
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig, dump
from fedjax_lora.core import hosts, trees
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.core.methods import Method
from fedjax_lora.core.progress import Progress, standing
from fedjax_lora.core.types import FedState
from fedjax_lora.io import checkpoint
from fedjax_lora.io.files import naming_a_full_disk
from fedjax_lora.io.lock import locked
from fedjax_lora.io.log import RunFolder, metrics_lines
from fedjax_lora.io.plan import Plan, effects_of_run
from fedjax_lora.io.run_files import read_metrics, read_summary
from fedjax_lora.io.summary import nothing_learned
from fedjax_lora.io.times import Times
from fedjax_lora.report.html import write_report
from fedjax_lora.sim.engine import Facts, Simulation
from fedjax_lora.sim.reach import reach_notes
from fedjax_lora.sim.scores import Scores


def run(
    config: ExperimentConfig,
    path: Path,
    resume: bool,
    console: Console,
    plan: Plan | None = None,
    methods: Sequence[Method] = (),
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run an experiment to its last round, or continue it from its last good checkpoint.

    The program is built, compiled and evaluated once before the folder is made: a mistake in the configuration
    leaves nothing behind. `wall_s`, `compile_s` and `samples_per_s` of the summary are those of the last start of a
    resumed run; `goodput`, `spent_s` and `starts` are of all of them. With the plan that the configuration has taken,
    the summary names it, and the effects on its bound under the errors of the run. SIGINT and SIGTERM are heard, see
    `app.signals`.

    Args:
      config, path, resume, console, plan: of the run.
      methods: a user's own, see `build`.
      files: where they come from: file or module -> SHA-256 of its text; a run is continued with the same alone.

    Returns:
      The summary, as in `summary.json`; that of a run that has ended already stays as it is.

    Raises:
      ValueError: the folder is in use, or cannot be resumed with this configuration, these weights or these data; or
        the disk is full.
      Interrupted: a signal asked for it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_a_full_disk(path))
        signals, progress = stack.enter_context(heard()), stack.enter_context(Progress(console))
        start = _Start(RunFolder(path), resume, stack, signals, progress)
        return _run(config, start, plan, methods, files or {})


class _Start(NamedTuple):
    """A start of a run: its folder, whether it was there before, what ends with the start, and what it speaks with."""

    folder: RunFolder
    resume: bool
    stack: contextlib.ExitStack
    signals: Signals
    progress: Progress


def _run(
    config: ExperimentConfig, start: _Start, plan: Plan | None, methods: Sequence[Method], files: Mapping[str, str]
) -> dict[str, Any]:
    started = time.perf_counter()
    folder, resume, stack, _, progress = start
    path, text = folder.path, dump(config)
    ended = begin = None
    if resume:  # what is on disk is read before anything is built
        folder.check_configuration(text)
        _lock(path, stack)
        ended, begin = folder.ended(), folder.last_checkpoint()
    else:
        folder.check_free()
    times = stack.enter_context(Times())
    progress.stage("reading the model and the data")
    simulation = build(config, methods)
    data = started_with(simulation.facts) | {"methods": dict(files)}
    if resume:
        folder.check_data(data)
    if ended and ended["rounds"] == config.rounds:
        hosts.on_first(write_report, [path], folder.report)
        return ended
    if resume and hosts.first():
        times.keep_in(path, begin.step if begin else 0)
    times.mark("data")
    for note in _notes(config, simulation):
        progress.print(f"note: {note}")
    progress.stage("compiling a round")
    state = simulation.init(jax.random.key(config.seed))
    initial = simulation.scores(state)
    if resume:
        state = checkpoint.restore(begin, state) if begin else state
        hosts.on_first(folder.reopen, int(state.round), text)
    else:
        hosts.on_first(RunFolder.create, path, text, data | stamp(simulation.facts))
        _lock(path, stack)
        if hosts.first():
            times.keep_in(path)
    times.mark("compile")
    progress.print(_setting(config, simulation, initial))
    rounds = config.rounds - int(state.round)
    training_s = _train(config, simulation, state, start, times)
    progress.stage("writing the report")
    told: dict[str, Any] = {"initial_accuracy": float(initial.accuracy), "wall_s": time.perf_counter() - started}
    told["compile_s"] = simulation.compile_s
    told["samples_per_s"] = _samples(simulation, rounds) / training_s if rounds else None
    told |= circumstances(config, simulation.facts) | _planned(plan, folder)
    times.mark("other")
    hosts.on_first(folder.write_summary, told | times.told())
    summary = read_summary(path)
    assert summary is not None  # it is written
    for trouble in summary["warnings"] if hosts.first() else ():
        warnings.warn(trouble, RunWarning, stacklevel=3)
    hosts.on_first(write_report, [path], folder.report)
    times.mark("other")
    return summary


def _lock(path: Path, stack: contextlib.ExitStack) -> None:
    """Keep others out of the folder as long as the stack lasts; one process does it for all of a run."""
    if hosts.first():
        stack.enter_context(locked(path))


def started_with(facts: Facts) -> dict[str, Any]:
    """What tells a run's data and model from any other: of `data.json`, what stays when a run is continued."""
    hashes = ("examples_hash", "partition_hash", "base_hash", "initial_hash", "model_config_hash", "tokenizer_hash")
    return {name: getattr(facts, name) for name in hashes} | {"class_names": list(facts.class_names)}


def stamp(facts: Facts) -> dict[str, Any]:
    """When a run was started, from which commit, and on which columns: of `data.json`, what is not compared."""
    return {"started": _now(), "commit": _commit(), "columns": dict(facts.columns)}


def _setting(config: ExperimentConfig, simulation: Simulation, initial: Scores) -> str:
    """What a run begins with, in one line."""
    names = simulation.facts.class_names
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    judged_by = simulation.judged_by
    classes = f"{len(names)} classes: {listed}; " if names else ""
    return (
        f"{classes}{config.clients.count} clients, {simulation.layout.cohort_size} a round, "
        f"{simulation.layout.chunk} at once; compiled in {simulation.compile_s:.1f} s; "
        f"{standing(initial.loss, initial.named(judged_by), ' before:', judged_by)}"
    )


def _train(config: ExperimentConfig, simulation: Simulation, state: FedState, start: _Start, times: Times) -> float:
    """Run what is left, segment by segment, each logged and saved as it ends; returns the seconds that it took.

    A segment is saved while the next one runs.
    """
    started, done, total = time.perf_counter(), int(state.round), config.rounds
    segments, learned = simulation.segments(state, total - done), True
    with checkpoint.Saver() as saver, start.signals.ending(_up_to(done, simulation.eval_every, total)) as signals:
        for state, metrics in start.progress.rounds(segments, done, total, simulation.judged_by):
            done = int(state.round)
            times.mark("rounds", done)
            lines = list(metrics_lines(metrics))
            hosts.on_first(start.folder.append, metrics)
            signals.agree()
            start.folder.save(state, saver)
            if done == total or signals.asked or hosts.several():  # whose threads would not keep one order
                saver.wait()
            times.mark("checkpoint")
            signals.leave(f"saved after round {done} of {total}")
            signals.running = _up_to(done, simulation.eval_every, total)
            before, learned = learned, any(line["participants"] for line in lines)
            if before and not learned:  # said once, however long it lasts
                warnings.warn(str(nothing_learned(lines)), RunWarning, stacklevel=4)
    return time.perf_counter() - started


def _up_to(done: int, eval_every: int, total: int) -> str:
    """What runs after so many rounds, and cannot be stopped in between."""
    return f"round {min(total, (done // eval_every + 1) * eval_every)} of {total}"


def circumstances(config: ExperimentConfig, facts: Facts) -> dict[str, Any]:
    """What the summary says of the run's setting and of the machine."""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "device": device_name(),
        "versions": versions(),
        "seed": config.seed,
        "partition_hash": facts.partition_hash,
        "latency_budget_s": getattr(config.control, "latency_budget_s", None),
    }


def _planned(plan: Plan | None, folder: RunFolder) -> dict[str, Any]:
    """What the summary says of the plan."""
    if plan is None:
        return {}
    effects = effects_of_run(plan, read_metrics(folder.path))
    return {"plan": plan.taken, "bound_effects": effects._asdict()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the Git repository that the run is started in, where there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _notes(config: ExperimentConfig, simulation: Simulation) -> list[str]:
    """What a user should know of this run beforehand."""
    notes = list(simulation.facts.notes)
    if cut := simulation.facts.truncated:
        longest = getattr(config.data, "max_length", None)
        notes.append(f"{cut} texts were cut to data.max_length = {longest} tokens")
    if simulation.make_parts(simulation.numbers).trainer.exchange is not None:
        first = simulation.init(jax.random.key(config.seed))
        notes += reach_notes(simulation, first, config.control)
    state = jax.eval_shape(simulation.init, jax.random.key(config.seed))
    for what, tree in (("what the clients keep", state.clients), ("what is merged into the base", state.merged)):
        if (size := trees.num_bytes(tree)) > 8 * config.clients.count:  # more than a rank each
            notes.append(f"{what} takes {size / 1e6:,.2f} MB of memory")
    return notes


def _samples(simulation: Simulation, rounds: int) -> float:
    """Examples that were trained on, for a cohort that holds as many as the mean of all clients."""
    work = simulation.make_parts(simulation.numbers).trainer.work(simulation.world.data.count)
    return rounds * simulation.layout.cohort_size * float(jnp.mean(work.samples))


def peak_memory_bytes() -> int:
    """The most memory that the accelerator, or on a CPU this process, has held."""
    stats = jax.local_devices()[0].memory_stats()
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
