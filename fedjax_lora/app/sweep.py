"""Many runs, one for each combination of values: each in a folder of its own, and one report over all."""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_lora.app.runner import run, started_with
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, dump
from fedjax_lora.config.user_methods import NO_METHODS, UserMethods
from fedjax_lora.config.yaml import parse_value
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.data.cache import keep_programs
from fedjax_lora.io.files import check_can_hold_files
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import is_run
from fedjax_lora.report.html import check_replaceable, write_report
from fedjax_lora.report.tables import comparison

_LONGEST_NAME = 100
_PLAIN = re.compile(r'[A-Za-z][\w.]*=[a-z0-9_.,:+"\[\]{} -]*', re.ASCII)  # values without capitals: cases may be one


def combinations(over: Sequence[str]) -> dict[str, list[str]]:
    """Folder name -> overrides `a.b=value`, for every combination of `a.b=[v1, v2, ...]`; the last varies fastest.

    Raises:
      ConfigError: one of `over` is of another form, or names a key or a value twice.
    """
    axes: dict[str, list[str]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        values = parse_value(listed, f"sweep {text!r}") if equals else None
        if not isinstance(values, list) or not values or not key.strip():
            raise ConfigError(f"sweep must be over key=[value, value, ...], got {text!r}")
        if key.strip() in axes:
            raise ConfigError(f"sweep must be over each key once, got {key.strip()!r} twice")
        axes[key.strip()] = _overrides(key.strip(), values)
    return {folder_name(chosen): list(chosen) for chosen in itertools.product(*axes.values())}


def _overrides(key: str, values: list[Any]) -> list[str]:
    """`key=value` for each value."""
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for value in values]
    if twice := next((text for text in overrides if overrides.count(text) > 1), None):
        raise ConfigError(f"sweep must be over each value once, got {twice} twice")
    return overrides


def folder_name(overrides: Sequence[str]) -> str:
    """The overrides themselves where they are short and plain, else their beginning and a hash of them all.

    Different overrides of the same keys have different names, on file systems that take capitals for small letters too.
    """
    name = ",".join(overrides)
    if len(name) <= _LONGEST_NAME and all(map(_PLAIN.fullmatch, overrides)):
        return name
    digest = "~" + hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16]
    start = re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII).lstrip(".-")
    return start[: _LONGEST_NAME - len(digest)] + digest


def sweep(
    over: Sequence[str],
    load: Callable[[list[str]], ExperimentConfig],
    path: Path,
    console: Console,
    methods: UserMethods = NO_METHODS,
) -> str:
    """Run what has not ended yet, one run for each of `combinations(over)`, and write `report.html` over all.

    Compiled programs are kept: runs that differ in traced numbers alone (rank, rates, weights, ratios) share one. A
    combination that is refused does not stop the others.

    Args:
      over: as of `combinations`.
      load: overrides -> configuration.
      path: of the folder of the runs' folders.
      console: told of each run.
      methods: a user's own, that the configurations may choose.

    Returns:
      The comparison of the runs, and what was refused and why, as text.

    Raises:
      ValueError: a folder is in use by another configuration, or by a run of other data or another model; two
        combinations are one configuration; or all are refused: the first reason.
    """
    keep_programs()
    if path.is_dir():
        check_replaceable(path / "report.html")
    check_can_hold_files(path)
    configs, refused = _load(combinations(over), load)
    ended = _ended({path / name: config for name, config in configs.items()}, methods)
    for number, (name, config) in enumerate(configs.items(), 1):
        console.print(f"run {number} of {len(configs)}: {name}", soft_wrap=True, markup=False)
        if path / name in ended:
            continue
        try:
            run(config, path / name, is_run(path / name), console, None, *methods)
        except (ValueError, OSError) as error:
            refused[name] = error
    folders = [path / name for name in configs if name not in refused]
    if not folders:
        raise next(iter(refused.values()))
    for name, error in refused.items():
        warnings.warn(f"{name} is refused: {_one_line(error)}", RunWarning, stacklevel=2)
    write_report(folders, path / "report.html")
    return "\n".join(
        [comparison(folders), *(f"refused: {name}: {_one_line(error)}" for name, error in refused.items())]
    )


def _load(
    chosen: Mapping[str, list[str]], load: Callable[[list[str]], ExperimentConfig]
) -> tuple[dict[str, ExperimentConfig], dict[str, ValueError | OSError]]:
    """The configurations by folder name, and why the others are refused."""
    names: dict[ExperimentConfig, str] = {}
    refused: dict[str, ValueError | OSError] = {}
    for name, overrides in chosen.items():
        try:
            config = load(overrides)
        except ConfigError as error:
            refused[name] = error
            continue
        if (other := names.setdefault(config, name)) != name:
            raise ConfigError(f"sweep must be over configurations that differ, got one for both {other} and {name}")
    return {name: config for config, name in names.items()}, refused


def _ended(configs: Mapping[Path, ExperimentConfig], methods: UserMethods) -> set[Path]:
    """The folders of runs that have ended.

    Raises:
      ValueError: a run was started with another configuration, other data or another model than it would be now.
    """
    now: dict[Any, dict[str, Any]] = {}
    started = {folder: config for folder, config in configs.items() if is_run(folder)}
    for folder, config in started.items():
        RunFolder(folder).check_configuration(dump(config))
        decisive = (config.data, config.model, config.pretrain, config.clients, config.seed)
        if decisive not in now:
            now[decisive] = started_with(build(config, methods.methods))
        RunFolder(folder).check_data(now[decisive])
    return {folder for folder, config in started.items() if _has_ended(folder, config)}


def _has_ended(folder: Path, config: ExperimentConfig) -> bool:
    summary = RunFolder(folder).ended()
    return summary is not None and summary["rounds"] == config.rounds


def _one_line(error: ValueError | OSError) -> str:
    return " ".join(str(error).split())
