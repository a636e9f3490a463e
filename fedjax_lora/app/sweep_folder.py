"""Sweeps on disk: each trial in the folder of a run, `results.csv`, and one report over all."""

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fedjax_lora.app.halving import Halving, Point
from fedjax_lora.app.runner import circumstances, stamp, started_with
from fedjax_lora.app.signals import Signals, heard
from fedjax_lora.app.trials import Begun, Standing, announce, became, play
from fedjax_lora.config.experiment import ExperimentConfig, dump
from fedjax_lora.config.groups import Group, grouped
from fedjax_lora.config.sweeps import Setting, folder_name
from fedjax_lora.config.user_methods import NO_METHODS, UserMethods
from fedjax_lora.core.errors import ConfigError, RunWarning
from fedjax_lora.core.progress import Progress
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.data.cache import keep_programs
from fedjax_lora.io import checkpoint
from fedjax_lora.io.files import check_can_hold_files, naming_a_full_disk
from fedjax_lora.io.lock import check_unlocked, locked
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import is_run, read_data, read_metrics
from fedjax_lora.io.sweep import Sweep, discard_found, write_found
from fedjax_lora.io.times import Times, sentence
from fedjax_lora.report.html import check_replaceable

_WAITING = 64
"""States of trials that may be held while others are written."""


def sweep_into(
    path: Path,
    settings: Sequence[Setting],
    load: Callable[[Setting], ExperimentConfig],
    console: Console,
    methods: UserMethods = NO_METHODS,
    halving: Halving | None = None,
) -> Sweep:
    """Run the trials that have not ended yet, those of equal structure side by side in one program.

    Each trial's folder is a run's, and `results.csv` has a row for each. A trial that is refused, or diverges, does not
    stop the others. A second start goes on from the last segment of each trial.

    Args:
      path: of the folder of the trials' folders.
      settings: swept keys -> values of each trial.
      load: setting -> configuration.
      console: told how far it is.
      methods: a user's own, that the configurations may choose.
      halving: which trials are stopped early; None for none.

    Raises:
      ValueError: a folder is in use by another process, by another configuration, or by a run of other data or another
        model; two settings are one configuration; all are refused: the first reason; or the disk is full.
      Interrupted: a signal asked for it; see `app.signals`.
    """
    keep_programs()
    if path.is_dir():
        check_replaceable(path / "report.html")
    check_can_hold_files(path)
    times = Times()
    configs, refused = load_all(settings, load)
    names = list(configs)
    groups, unbuilt = grouped(list(configs.values()), methods.methods)
    refused |= {names[place]: error for place, error in unbuilt.items()}
    if not groups:
        raise next(iter(refused.values()))
    path.mkdir(parents=True, exist_ok=True)
    with naming_a_full_disk(path), locked(path), times, heard() as signals, checkpoint.Saver(_WAITING) as saver:
        folders = _Folders(path, names, groups, methods, saver, signals, times)
        begun = folders.open()
        discard_found(path)
        times.keep_in(path, sum(standing.done for standing in begun.values()))
        times.mark("data")
        announce(console, groups, len(settings))
        with signals.ending("the running segment of each trial"), Progress(console) as progress:
            stopped = play(groups, folders, progress, begun, halving)
        folders.end_all()
        times.mark("other")
    console.print(sentence(times.told()))
    reasons = _in_words(refused)
    for name, reason in reasons.items():
        warnings.warn(f"{name} is refused: {reason}", RunWarning, stacklevel=2)
    return summed_up(path, settings, reasons, {names[place] for place in stopped})


def part_into(
    path: Path, settings: Sequence[Setting], load: Callable[[Setting], ExperimentConfig], methods: UserMethods
) -> dict[str, str]:
    """A part of a sweep, run as `sweep_into` runs it, in a folder that whoever divided the sweep holds and sums up.

    Returns:
      Name -> why a trial was refused.
    """
    keep_programs()
    configs, refused = load_all(settings, load)
    names = list(configs)
    groups, unbuilt = grouped(list(configs.values()), methods.methods)
    refused |= {names[place]: error for place, error in unbuilt.items()}
    with naming_a_full_disk(path), Times() as times, checkpoint.Saver(_WAITING) as saver:
        folders = _Folders(path, names, groups, methods, saver, Signals(), times)
        begun = folders.open()
        with Progress(Console(quiet=True)) as progress:
            play(groups, folders, progress, begun)
        folders.end_all()
    return _in_words(refused)


def summed_up(path: Path, settings: Sequence[Setting], reasons: Mapping[str, str], stopped: Collection[str]) -> Sweep:
    """Write what became of all trials; `reasons` and `stopped` are by the names of their folders."""
    by_name = {folder_name(setting): setting for setting in settings}
    status = {
        name: "refused" if name in reasons else became(read_metrics(path / name)[-1], name in stopped)
        for name in by_name
    }
    found = Sweep(path, by_name, status, dict(reasons))
    write_found(found)
    return found


def _in_words(errors: Mapping[str, Exception]) -> dict[str, str]:
    return {name: " ".join(str(error).split()) for name, error in errors.items()}


def load_all(
    settings: Sequence[Setting], load: Callable[[Setting], ExperimentConfig]
) -> tuple[dict[str, ExperimentConfig], dict[str, ValueError | OSError]]:
    """The configurations by folder name, and why the others are refused."""
    names: dict[ExperimentConfig, str] = {}
    refused: dict[str, ValueError | OSError] = {}
    for setting in settings:
        name = folder_name(setting)
        try:
            config = load(setting)
        except ConfigError as error:
            refused[name] = error
            continue
        if config in names:
            raise ConfigError(
                f"sweep must be over configurations that differ, got one for both {names[config]} and {name}"
            )
        names[config] = name
    return {name: config for config, name in names.items()}, refused


class _Folders:
    """The folders of a sweep's trials, each that of a run."""

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        groups: Sequence[Group],
        methods: UserMethods,
        saver: checkpoint.Saver,
        signals: Signals,
        times: Times,
    ):
        self._saver, self._signals, self._times, self._done = saver, signals, times, 0
        self._folders = [RunFolder(path / name) for name in names]
        self._since_s: dict[int, float] = {}
        self._at_once: dict[int, int] = {}
        self._wall_s: dict[int, float] = {}
        self._compile_s: dict[int, dict[int, float]] = {}
        self._of: dict[int, tuple[Group, int]] = {
            place: (group, number) for group in groups for number, place in enumerate(group.places)
        }
        self._methods = methods

    def open(self) -> dict[int, Standing]:
        """Place -> where the trials stand that are on disk, as their checkpoints have it.

        Raises:
          ValueError: one is in use, or was started with another configuration, other data or another model.
        """
        held = {place: self._folders[place] for place in self._of if is_run(self._folders[place].path)}
        for place, folder in held.items():
            check_unlocked(folder.path)
            folder.check_configuration(dump(self._config(place)))
            folder.check_data(self._data(place))
        found = {}
        for place, folder in held.items():
            if (last := folder.last_checkpoint()) is not None:
                ended = last.step == self._config(place).rounds
                state = None if ended else checkpoint.restore(last, self._like(place))
                found[place] = Standing(last.step, state)
        self._done = sum(standing.done for standing in found.values())
        return found

    def begin(self, place: int, begun: Begun) -> None:
        """Make the folder of a trial, or open it where it is."""
        self._times.mark("compile")
        self._since_s[place], self._at_once[place] = begun.started_s, begun.at_once
        self._compile_s.setdefault(place, {})[begun.at_once] = begun.compile_s
        folder, text = self._folders[place], dump(self._config(place))
        if not is_run(folder.path):
            group, number = self._of[place]
            started = stamp(group.facts[number]) | {"initial_accuracy": begun.initial_accuracy}
            RunFolder.create(folder.path, text, self._data(place) | started)
            return
        self._saver.wait()
        last = folder.last_checkpoint()
        folder.reopen(last.step if last else 0, text)

    def keep(self, place: int, state: FedState, metrics: Metrics) -> None:
        """Log a segment and save its state; the last one ends the trial."""
        self._done += len(metrics.round)
        self._times.mark("rounds", self._done)
        self._folders[place].append(metrics)
        self._folders[place].save(state, self._saver)
        now = time.perf_counter()
        of_this = (now - self._since_s[place]) / self._at_once[place]
        self._wall_s[place], self._since_s[place] = self._wall_s.get(place, 0.0) + of_this, now
        if int(state.round) == self._config(place).rounds:
            self._saver.wait()
            self.end(place)
        self._times.mark("checkpoint")

    def kept(self) -> None:
        """Leave, with all trials saved, if a signal has come."""
        if self._signals.asked:
            self._saver.wait()
        self._signals.leave("all trials are saved as far as they are")

    def end(self, place: int) -> None:
        """Write the summary of a trial that goes on no more."""
        if self._folders[place].ended() is None:
            group, number = self._of[place]
            told = circumstances(self._config(place), group.facts[number])
            told["initial_accuracy"] = read_data(self._folders[place].path).get("initial_accuracy")
            if place in self._wall_s:
                told["compile_s"] = sum(self._compile_s[place].values())
                told["wall_s"] = self._wall_s[place]
            self._folders[place].write_summary(told)

    def end_all(self) -> None:
        """Write what a kill, or halving, has left unwritten."""
        for place in self._of:
            self.end(place)

    def points(self, place: int, halving: Halving, rung: int) -> list[Point]:
        """The evaluations of a trial up to a round, of its log."""
        return halving.points(read_metrics(self._folders[place].path), rung)

    def _config(self, place: int) -> ExperimentConfig:
        group, number = self._of[place]
        return group.configs[number]

    def _data(self, place: int) -> dict[str, Any]:
        group, number = self._of[place]
        return started_with(group.facts[number]) | {"methods": dict(self._methods.files)}

    def _like(self, place: int) -> Any:
        group, _ = self._of[place]
        return group.simulation.init(jax.random.key(0))
