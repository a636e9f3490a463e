"""What a sweep came to, as numbers: trials that differ in nothing but their seed are one cell."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from fedjax_lora.config.sweeps import Setting
from fedjax_lora.io.sweep import Sweep, swept_keys
from fedjax_lora.report.runs import Run, load_runs

SEED = "seed"
_NEAR_BEST = 0.95
"""The target is so much of the best accuracy, where none is asked for."""

Measure = Literal["final_accuracy", "personal_accuracy", "final_loss"]
_OF_LINE = {"final_accuracy": "eval_accuracy", "personal_accuracy": "personal_accuracy", "final_loss": "eval_loss"}
"""Field of a summary -> field of a round."""


class Trial(NamedTuple):
    """One trial: its swept keys, what became of it, why, and its run; no run where it was refused."""

    name: str
    setting: Setting
    status: str
    reason: str
    run: Run | None


class Spread(NamedTuple):
    """Mean and sample deviation (of a single value: None) of `size` values."""

    mean: float
    deviation: float | None
    size: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of the values that were measured; None where none was."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        mean = math.fsum(known) / len(known)
        if len(known) == 1:
            return cls(mean, None, 1)
        squares = math.fsum((value - mean) ** 2 for value in known)  # statistics.stdev takes ten times as long
        return cls(mean, math.sqrt(squares / (len(known) - 1)), len(known))


class Reached(NamedTuple):
    """What trials had spent when their accuracy first was at the target; over those `by` of `trials` that got there.

    rounds, bits (uplink), seconds (simulated): None where none got there, or the time is not known.
    """

    rounds: Spread | None
    bits: Spread | None
    seconds: Spread | None
    by: int
    trials: int


class Cell(NamedTuple):
    """The trials of one setting, which differ in their seed alone."""

    setting: Setting
    trials: list[Trial]

    @property
    def run(self) -> list[Run]:
        """All that were run."""
        return [trial.run for trial in self.trials if trial.run]

    @property
    def told(self) -> list[Run]:
        """Those that the cell's numbers are of: that have ended, else that were stopped; none where all diverged."""
        for status in ("ended", "stopped"):
            if found := [trial.run for trial in self.trials if trial.run and trial.status == status]:
                return found
        return []

    @property
    def is_whole(self) -> bool:
        """Whether every trial has ended."""
        return all(trial.status == "ended" for trial in self.trials)

    @property
    def status(self) -> str:
        """In words where not every trial has ended, as `2 ended, 1 diverged`; else how many have."""
        each = [trial.status for trial in self.trials]
        counts = {status: each.count(status) for status in ("ended", "stopped", "diverged", "refused")}
        if self.is_whole:
            return str(len(each))
        if len(each) == 1:
            return each[0]
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    def spread(self, field: str) -> Spread | None:
        """Of a field of the summaries."""
        return Spread.of(run.summary.get(field) for run in self.told)

    def reached(self, measure: Measure, target: float) -> Reached:
        """What was spent until an accuracy was at the target, by all that were run."""
        found = [first for run in self.run if (first := _first(run, _OF_LINE[measure], target))]
        rounds, bits, seconds = ([first[i] for first in found] for i in range(3))
        return Reached(Spread.of(rounds), Spread.of(bits), Spread.of(seconds), len(found), len(self.run))


class Results(NamedTuple):
    """A sweep as its report sees it.

    trials: as they were set. cells: of them, in their order. keys: that vary between cells. seeds: the most trials of
    a cell. measure: the accuracy that is told, the clients' own where every run has it, or the loss of a task that has
    no accuracy. target: an accuracy to reach, None where no accuracy was measured. asked: whether the target was asked
    for.
    """

    trials: list[Trial]
    cells: list[Cell]
    keys: list[str]
    seeds: int
    measure: Measure
    target: float | None
    asked: bool

    @property
    def of_line(self) -> str:
        """Field of a round that `measure` is the last of."""
        return _OF_LINE[self.measure]

    @property
    def runs(self) -> list[Run]:
        """Of all trials that were run."""
        return [trial.run for trial in self.trials if trial.run]


def results(found: Sweep, target: float | None = None) -> Results:
    """Read the runs of a sweep, and put together those of equal settings.

    Args:
      found: the sweep.
      target: accuracy to reach; 0.95 of the best accuracy of all trials by default.

    Raises:
      ValueError: the target is no accuracy, or none was measured; or the log or the summary of a trial was changed or
        damaged.
    """
    check_target(target)
    trials = _trials(found)
    runs = [trial.run for trial in trials if trial.run]
    measure = _measure(runs)
    if measure == "final_loss" and target is not None:
        raise ValueError(f"target must not be given where no accuracy is measured, got {target}")
    reached = [line[_OF_LINE[measure]] for run in runs for line in run.metrics if measure != "final_loss"]
    best = max((value for value in reached if value is not None), default=None)
    cells = _cells(trials)
    return Results(
        trials,
        cells,
        _varying([cell.setting for cell in cells]),
        max((len(cell.trials) for cell in cells), default=0),
        measure,
        target if target is not None or best is None else _NEAR_BEST * best,
        target is not None,
    )


def _measure(runs: Sequence[Run]) -> Measure:
    """What is told of these runs, see `Results`."""

    def any_has(field: str) -> bool:
        return any(run.summary.get(field) is not None for run in runs)

    if runs and all(run.summary.get("personal_accuracy") is not None for run in runs):
        return "personal_accuracy"
    return "final_loss" if any_has("final_loss") and not any_has("best_accuracy") else "final_accuracy"


def check_target(target: float | None) -> None:
    """Refuse a target that no accuracy can be.

    Raises:
      ValueError: names what is allowed.
    """
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target must be an accuracy above 0 and at most 1, got {target}")


def same(value: Any) -> str:
    """What values have in common if and only if they are the same, whatever they are made of."""
    return json.dumps(value, sort_keys=True)


def _trials(found: Sweep) -> list[Trial]:
    runs = {run.folder: run for run in load_runs(found.folders)} if found.folders else {}
    trials = []
    for name, setting in found.settings.items():
        status, run = found.status[name], runs.get(found.path / name)
        reason = found.reasons.get(name) or (_trouble(run, status) if run else "")
        trials.append(Trial(name, setting, status, reason, run))
    return trials


def _trouble(run: Run, status: str) -> str:
    """What a run that has not ended well says of itself."""
    if status == "stopped":
        return f"it lagged behind after round {len(run.metrics)} of {run.config.get('rounds', 'more')}"
    warnings = run.summary.get("warnings") or []
    return str(warnings[0]) if status == "diverged" and warnings else ""


def _cells(trials: Iterable[Trial]) -> list[Cell]:
    cells: dict[str, Cell] = {}
    for trial in trials:
        setting = {key: value for key, value in trial.setting.items() if key != SEED}
        cells.setdefault(same(setting), Cell(setting, [])).trials.append(trial)
    return list(cells.values())


def _varying(settings: list[Setting]) -> list[str]:
    """The keys of which not every setting has the same value."""
    first = settings[0] if settings else {}
    return [
        key
        for key in swept_keys(settings)
        if any(key not in setting or key not in first or same(setting[key]) != same(first[key]) for setting in settings)
    ]


def _first(run: Run, field: str, target: float) -> tuple[int, int, float | None] | None:
    """Rounds, uplink bits and simulated seconds until the field first is at the target; None where it never is."""
    bits = 0
    for line in run.metrics:
        bits += line["uplink_bits"]
        if line[field] is not None and line[field] >= target:
            return line["round"], bits, line["cumulative_latency_s"]
    return None
