"""The folder of a sweep: `sweep.json`, which tells what was varied and what came of it, and `results.csv`."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedjax_lora.config.sweeps import Setting
from fedjax_lora.io import sealed
from fedjax_lora.io.files import write_atomically
from fedjax_lora.io.log import RunFolder

RESULTS, FOUND = "results.csv", "sweep.json"

COLUMNS = (
    *("final_accuracy", "best_accuracy", "personal_accuracy", "final_loss", "total_uplink_bits", "total_downlink_bits"),
    *("total_latency_s", "mean_latency_s", "latency_over_budget", "final_queue_s", "rounds", "lost_rounds"),
    *("diverged_rounds", "initial_accuracy", "wall_s", "compile_s"),
)
"""Fields of a summary that `results.csv` has, after the name, the swept keys and the status."""


class Sweep(NamedTuple):
    """What a sweep on disk came to.

    path: of its folder. settings: name -> swept keys. status: name -> `ended`, `diverged`, `stopped` or `refused`.
    reasons: name -> why it was refused.
    """

    path: Path
    settings: dict[str, Setting]
    status: dict[str, str]
    reasons: dict[str, str]

    @property
    def folders(self) -> list[Path]:
        """Of the trials that were run."""
        return [self.path / name for name, status in self.status.items() if status != "refused"]


def columns(settings: Iterable[Setting]) -> list[str]:
    """Names of the columns of `results.csv`."""
    return ["trial", *swept_keys(settings), "status", *COLUMNS]


def swept_keys(settings: Iterable[Setting]) -> list[str]:
    """The keys that any of the settings has, as they come."""
    return list(dict.fromkeys(key for setting in settings for key in setting))


def write_found(found: Sweep) -> None:
    """Write `results.csv` and, for `read_found`, `sweep.json`."""
    write_results(found)
    settings = {name: json.dumps(setting) for name, setting in found.settings.items()}  # as text may hold infinity
    told = {"settings": settings, "status": found.status, "reasons": found.reasons}
    sealed.write(found.path / FOUND, told)


def discard_found(path: Path) -> None:
    """Remove what `write_found` wrote: a sweep that goes on is not what it was."""
    for name in (FOUND, RESULTS):
        (path / name).unlink(missing_ok=True)


def read_found(path: str | Path) -> Sweep | None:
    """What `write_found` wrote in a folder; None where it holds no sweep that has ended.

    Raises:
      ValueError: `sweep.json` was changed since.
    """
    told = sealed.read(Path(path) / FOUND)
    if told is None:
        return None
    settings = {name: json.loads(text) for name, text in told["settings"].items()}
    return Sweep(Path(path), settings, told["status"], told["reasons"])


def write_results(found: Sweep) -> None:
    """`results.csv`: one row a trial, in the order of the settings; empty where there is no value."""
    keys = swept_keys(found.settings.values())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(found.settings.values()))
    for name, setting in found.settings.items():
        summary = (RunFolder(found.path / name).ended() if found.status[name] != "refused" else None) or {}
        values = [summary.get(column) for column in COLUMNS]
        writer.writerow([name, *(setting.get(key) for key in keys), found.status[name], *values])
    write_atomically(found.path / RESULTS, text.getvalue())
