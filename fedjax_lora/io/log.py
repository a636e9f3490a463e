"""The folder of a run: `config.yaml`, `data.json`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `report.html`."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lora.config.yaml import parse_value
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.io import checkpoint, sealed
from fedjax_lora.io.files import atomic_folder, check_can_become_folder, write_atomically
from fedjax_lora.io.run_files import (
    CONFIG,
    DATA,
    FIELDS,
    METRICS,
    SUMMARY,
    check_config,
    check_log,
    flatten,
    log_sha256,
    read_config,
    read_data,
    read_metrics,
    read_summary,
    whole_lines,
)
from fedjax_lora.io.summary import summarize, troubles
from fedjax_lora.training.optimizers import OptimizerConfig, depends_on_rounds

RUN_FIELDS = (
    "initial_accuracy",
    "wall_s",
    "compile_s",
    "samples_per_s",
    "peak_memory_bytes",
    "device",
    "versions",
    "seed",
    "partition_hash",
    "latency_budget_s",
    "plan",
    "bound_effects",
    "goodput",
    "spent_s",
    "starts",
)
"""What `write_summary` is told; the rest of `summary.json` is computed from `metrics.jsonl`."""


class RunFolder:
    """One run on disk. A new one is made by `create`; read with `read_config`, `read_metrics`, `read_summary`.

    A round counts once its line ends in a newline. Lines are written before the checkpoint of their last round, which
    holds a hash of the log so far: a run goes on from the newest checkpoint that is whole and whose rounds the log
    still holds as they were, and what the log holds beyond it is dropped.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.path / "report.html"

    def check_free(self) -> None:
        """Refuse a place where no run can be created.

        Raises:
          ValueError: it holds a run already, is a file or a folder that is not empty, or cannot be made.
        """
        path = self.path
        if (path / CONFIG).exists():
            raise ValueError(f"{path} already holds a run: continue it with --resume, or choose another --out")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ValueError(f"{path} must be a new or an empty folder to start a run in, got one in use")
        check_can_become_folder(path)

    def check_configuration(self, config_text: str) -> None:
        """Refuse to resume with a configuration that is not the run's.

        `plan`, which a run ignores, may differ, and `engine.trials_at_once` and `engine.model_devices`; and `rounds` as
        `may_extend` says.

        Raises:
          ValueError: there is no run, or its configuration differs; names the first key that does.
        """
        check_config(self.path)
        before, now = (
            {section: value for section, value in config.items() if section != "plan"}
            for config in (read_config(self.path), parse_value(config_text, "configuration"))
        )
        for engine in (before.get("engine"), now.get("engine")):
            if isinstance(engine, dict):
                engine.pop("trials_at_once", None)
                engine.pop("model_devices", None)
        if may_extend(before, now):
            before["rounds"] = now["rounds"]
        _check_same(before, now, self.path / CONFIG)

    @classmethod
    def create(cls, path: str | Path, config_text: str, data: Mapping[str, Any]) -> "RunFolder":
        """A new run folder that holds `config.yaml` and `data.json`; it appears in full or not at all.

        Args:
          path: of the folder.
          config_text: YAML of the resolved configuration.
          data: what the run is started with, see `read_data`.

        Raises:
          ValueError: `check_free` refuses the path, or it cannot be written.
        """
        run = cls(path)
        run.check_free()
        with atomic_folder(path) as partial:
            (partial / "checkpoints").mkdir()
            (partial / CONFIG).write_text(config_text, encoding="utf-8")
            sealed.write(partial / DATA, {**data, "config_sha256": [_sha256(config_text)]})
            (partial / METRICS).touch()
        return run

    def check_data(self, data: Mapping[str, Any]) -> None:
        """Refuse to go on with other weights, data or classes than those the run was started with.

        Raises:
          ValueError: names the first key of `data` that differs.
        """
        before = read_data(self.path)
        _check_same({"data": {key: before.get(key) for key in data}}, {"data": data}, self.path / DATA)

    def reopen(self, rounds: int, config_text: str) -> None:
        """Go on after so many rounds, with a configuration that `check_configuration` allows.

        Every line after them is dropped, and a last line that a kill has torn; the run has not ended any more.
        """
        (self.path / SUMMARY).unlink(missing_ok=True)
        os.truncate(self.path / METRICS, sum(map(len, whole_lines(self.path)[:rounds])))
        if may_extend(read_config(self.path), parse_value(config_text, "configuration")):
            held = {key: value for key, value in read_data(self.path).items() if key != "sha256"}
            known = [*held["config_sha256"], _sha256(config_text)]  # first: a kill leaves either one
            sealed.write(self.path / DATA, held | {"config_sha256": known})
            write_atomically(self.path / CONFIG, config_text)

    def last_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint that is whole and whose rounds the log holds as they were; None where there is none.

        Warns of each that is passed over.

        Raises:
          ValueError: there is no log.
        """
        for found in checkpoint.whole(self.checkpoints):
            if log_sha256(self.path, found.step) == found.log_sha256:
                return found
            warnings.warn(
                f"checkpoint {found.path} is passed over: {self.path / METRICS} does not hold its rounds as they were",
                RunWarning,
                stacklevel=2,
            )
        return None

    def save(self, state: FedState, saver: checkpoint.Saver | None = None) -> None:
        """Write the checkpoint of rounds whose lines the log holds already; without a saver, done when it returns.

        Raises:
          ValueError: it cannot be written.
        """
        save = saver.save if saver else checkpoint.save
        save(self.checkpoints, state, log_sha256(self.path, int(state.round)) or "")

    def append(self, metrics: Metrics) -> list[dict[str, Any]]:
        """Add one line for each of the stacked rounds of `metrics`, leaves `[rounds, ...]`; returns the lines."""
        lines = list(metrics_lines(metrics))
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        return lines

    def write_summary(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` from the log and from `run`, whose keys are of `RUN_FIELDS` (absent: null).

        Returns:
          The summary.
        """
        unknown = sorted(set(run) - set(RUN_FIELDS))
        if unknown:
            raise ValueError(f"summary field must be one of {', '.join(RUN_FIELDS)}, got {unknown[0]}")
        told = {name: _plain(run.get(name)) for name in RUN_FIELDS}
        lines = read_metrics(self.path)
        summary = {"initial_accuracy": told["initial_accuracy"], **summarize(lines, told["latency_budget_s"]), **told}
        summary["warnings"] = troubles(lines, summary)
        summary["metrics_sha256"] = log_sha256(self.path, len(lines))
        return sealed.write(self.path / SUMMARY, summary)

    def ended(self) -> dict[str, Any] | None:
        """The summary of a run that has ended; None where it has not, or where summary or log were damaged since.

        Warns of the damage: such a run is to be ended anew from its last good checkpoint.
        """
        try:
            summary = read_summary(self.path)
            if summary is not None:
                check_log(self.path, summary)
        except ValueError as error:
            warnings.warn(str(error), RunWarning, stacklevel=2)
            return None
        return summary


def may_extend(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the configuration `now` asks for more rounds than `before`, and no rate depends on their number."""
    had, has = before.get("rounds"), now.get("rounds")
    if not (type(had) is int and type(has) is int and had < has):
        return False
    return not depends_on_rounds(OptimizerConfig(**now["local"]["optimizer"]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError at the first key whose value is not the one that the file at `path` holds."""
    old, new = flatten(before), flatten(now)
    for key in [*new, *old]:
        had, has = (repr(tree[key]) if key in tree else "absent" for tree in (old, new))
        if had != has:
            raise ValueError(f"{key} must be {had} as in {path} to resume the run, got {has}; or choose another --out")


def metrics_lines(metrics: Metrics) -> Iterator[dict[str, Any]]:
    """Stacked rounds as lines of `metrics.jsonl`, see `read_metrics`."""
    columns = {name: np.asarray(getattr(metrics, attribute)) for name, attribute in FIELDS.items()}
    columns |= {name: np.asarray(column) for name, column in metrics.methods.items()}
    for i in range(len(columns["round"])):
        yield {name: _plain(column[i]) for name, column in columns.items()}


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, NumPy and JAX scalars as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if getattr(value, "ndim", 0) > 0:
        return [_plain(item) for item in np.asarray(value)]
    if getattr(value, "ndim", None) == 0:
        value = np.asarray(value)[()]
        # The shortest decimal that names the float32, instead of the 17 digits of its double.
        value = float(str(value)) if isinstance(value, np.floating) else value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
