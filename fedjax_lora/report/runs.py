"""What a report knows of a run: its logs, and nothing else."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import checkpoint
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import (
    check_config,
    check_log,
    flatten,
    is_run,
    read_config,
    read_metrics,
    read_summary,
    whole_lines,
)
from fedjax_lora.io.summary import summarize, troubles
from fedjax_lora.report.formats import last_name, option, setting

_LONGEST_LABEL = 48  # characters
BUDGET = "control.latency_budget_s"


class Run(NamedTuple):
    """One run, as its folder tells it.

    name: of the folder; the whole path where two folders share a name.
    config: resolved configuration with dotted keys.
    metrics: one dict a round, oldest first; at least one.
    summary: of `summary.json`; as far as the metrics tell it while the run has not ended.
    folder: of the run.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path


def load_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs of some folders, in their order; a folder of runs, as a sweep's, stands for them all, by name.

    Of a folder of runs, what is hidden is passed over, and, with a warning, a run without a finished round.

    Raises:
      ValueError: no folder is given, or one is no run's and holds none, or has no round in its log; a log was changed
        or damaged.
    """
    paths = [path for folder in folders for path in _runs_in(Path(folder))]
    if not paths:
        raise ValueError("run folders must be at least one, got none")
    names = [path.resolve().name for path in paths]
    shared = [names.count(name) > 1 for name in names]
    return [_load(path, str(path) if s else name) for path, name, s in zip(paths, names, shared, strict=True)]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Dotted keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def labels(runs: Sequence[Run]) -> list[str]:
    """Names of the runs for a legend: by what differs where that is short and tells them apart, else their own.

    Where runs differ in the `name` of a section, that stands for the options that only some of them have.
    """
    keys = [key for key in differing_keys(runs) if all(key in run.config for run in runs)]
    short = [", ".join(part(key, run.config[key]) for key in keys) for run in runs]
    distinct = len(set(short)) == len(runs)
    return short if distinct and keys and max(map(len, short)) <= _LONGEST_LABEL else [run.name for run in runs]


def part(key: str, value: Any) -> str:
    """An option in words; of a method or a text, the value alone."""
    if key.endswith(".name") or isinstance(value, str):
        return last_name(setting(value).text)
    return option(key, value)


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    held = sorted(path for path in folder.glob("[!.]*") if is_run(path))
    begun = [path for path in held if whole_lines(path)]
    if held and not begun:
        raise ValueError(f"{folder} must hold a run with at least one finished round, got {len(held)} without")
    for path in held:
        if path not in begun:
            warnings.warn(f"{path} is left out: the run has no finished round", RunWarning, stacklevel=4)
    return begun or [folder]


def _load(path: Path, name: str) -> Run:
    check_config(path)
    config, metrics = flatten(read_config(path)), read_metrics(path)
    if not metrics:
        raise ValueError(f"{path} must hold the metrics of at least one round, got none")
    summary = read_summary(path)
    if summary is None:
        _check_saved(path)
        budget_s = config.get(BUDGET)
        summary = summarize(metrics, budget_s) | {"latency_budget_s": budget_s}
        summary["warnings"] = troubles(metrics, summary)
    else:
        check_log(path, summary)
    return Run(name, config, metrics, summary, path)


def _check_saved(path: Path) -> None:
    """Refuse the log of a run that has not ended where no checkpoint tells that its rounds are as they were."""
    folder = RunFolder(path)
    if checkpoint.steps(folder.checkpoints) and folder.last_checkpoint() is None:
        raise ValueError(f"{path} must hold the log that its checkpoints were written with, got one that was changed")
