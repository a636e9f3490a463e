"""Many runs, one for each combination of values: each in a folder of its own, and one report over all."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fedjax_lora.config import ConfigError, ExperimentConfig, load_config
from fedjax_lora.data.cache import keep_programs
from fedjax_lora.io.log import read_summary
from fedjax_lora.reading import parse_value
from fedjax_lora.report.html import write_report
from fedjax_lora.report.tables import comparison
from fedjax_lora.runner import run


def combinations(over: Sequence[str]) -> dict[str, list[str]]:
    """Folder name -> overrides `a.b=value`, for every combination of `a.b=[v1, v2, ...]`; the last varies fastest.

    Raises:
      ConfigError: one of `over` is of another form, or names a key twice.
    """
    axes: dict[str, list[str]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        values = parse_value(listed, f"sweep {text!r}") if equals else None
        if not isinstance(values, list) or not values or not key.strip():
            raise ConfigError(f"sweep must be over key=[value, value, ...], got {text!r}")
        if key.strip() in axes:
            raise ConfigError(f"sweep must be over each key once, got {key.strip()!r} twice")
        axes[key.strip()] = [f"{key.strip()}={json.dumps(value)}" for value in values]
    return {",".join(chosen).replace("/", "_"): list(chosen) for chosen in itertools.product(*axes.values())}


def sweep(configs: Mapping[str, ExperimentConfig], path: Path, console: Console) -> str:
    """Run what has not ended yet, folder name -> configuration, and write `report.html` over all.

    Compiled programs are kept: runs that differ in traced numbers alone (rank, rates, weights, ratios) share one.

    Returns:
      The comparison, as text.

    Raises:
      ValueError: a folder is in use by another configuration.
    """
    keep_programs()
    for number, (name, config) in enumerate(configs.items(), 1):
        console.print(f"run {number} of {len(configs)}: {name}", soft_wrap=True)
        if not _ended(config, path / name):
            run(config, path / name, (path / name).exists(), console)
    folders = [path / name for name in configs]
    write_report(folders, path / "report.html")
    return comparison(folders)


def _ended(config: ExperimentConfig, path: Path) -> bool:
    return path.exists() and read_summary(path) is not None and load_config(path / "config.yaml") == config
