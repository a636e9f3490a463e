"""The folder of a run: `config.yaml`, `data.json`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `report.html`."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedjax_lora.base import Metrics
from fedjax_lora.io.files import atomic_folder, check_can_hold_files, write_atomically
from fedjax_lora.sim.optimizers import OptimizerConfig, depends_on_rounds

FIELDS = {
    "round": "round",
    "train_loss": "train_loss",
    "eval_loss": "eval_loss",
    "eval_accuracy": "eval_accuracy",
    "personal_accuracy": "personal_accuracy",
    "latency_s": "latency_s",
    "cumulative_latency_s": "elapsed_s",
    "uplink_bits": "uplink_bits",
    "downlink_bits": "downlink_bits",
    "energy_j": "energy_j",
    "queue_s": "queue_s",
    "energy_queue_j": "energy_queue_j",
    "keep_ratio_mean": "keep_ratio_mean",
    "kept_ranks_mean": "kept_ranks_mean",
    "participants": "participants",
    "outages": "outages",
    "nonfinite_clients": "nonfinite_clients",
    "sparsification_error": "sparsification_error",
    "covariance_error": "covariance_error",
    "orthogonality": "orthogonality",
    "dropped_energy": "dropped_energy",
    "tail_energy": "tail_energy",
}
"""Field of a line of `metrics.jsonl` -> attribute of `Metrics`, in the order of the line."""

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
    "plan",
    "bound_effects",
)
"""What `write_summary` is told; the rest of `summary.json` is computed from `metrics.jsonl`."""

_CONFIG, _DATA, _METRICS, _SUMMARY = "config.yaml", "data.json", "metrics.jsonl", "summary.json"


class RunFolder:
    """One run on disk. Made by `create` or `resume`; read with `read_config`, `read_metrics`, `read_summary`.

    A round counts once its line ends in a newline. Lines are written before the checkpoint of their last round,
    so the log is never behind a checkpoint; `truncate` drops what is ahead of it.
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

    @staticmethod
    def check_free(path: str | Path) -> None:
        """Refuse a place where no run can be created.

        Raises:
          ValueError: `path` holds a run already, is a file or a folder that is not empty, or cannot be made.
        """
        folder = Path(path)
        if (folder / _CONFIG).exists():
            raise ValueError(f"{path} already holds a run: continue it with --resume, or choose another --out")
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{path} must be a new or an empty folder to start a run in, got one in use")
        check_can_hold_files(folder)

    @staticmethod
    def check_configuration(path: str | Path, config_text: str) -> None:
        """Refuse to resume with a configuration that is not the run's.

        `plan`, which a run ignores, may differ, and `rounds` as `may_extend` says.

        Raises:
          ValueError: there is no run, or its configuration differs; names the first key that does.
        """
        before, now = (
            {section: value for section, value in config.items() if section != "plan"}
            for config in (read_config(path), yaml.safe_load(config_text))
        )
        if may_extend(before, now):
            before["rounds"] = now["rounds"]
        _check_same(before, now, Path(path) / _CONFIG)

    @classmethod
    def create(cls, path: str | Path, config_text: str, data: Mapping[str, str]) -> "RunFolder":
        """A new run folder that holds `config.yaml` and `data.json`; it appears in full or not at all.

        Args:
          path: of the folder.
          config_text: YAML of the resolved configuration.
          data: hashes that tell the data from any other.

        Raises:
          ValueError: `check_free` refuses the path, or it cannot be written.
        """
        cls.check_free(path)
        with atomic_folder(path) as partial:
            (partial / "checkpoints").mkdir()
            (partial / _CONFIG).write_text(config_text, encoding="utf-8")
            (partial / _DATA).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            (partial / _METRICS).touch()
        return cls(path)

    @classmethod
    def resume(cls, path: str | Path, config_text: str, data: Mapping[str, str]) -> "RunFolder":
        """The run that `path` holds, if it was started with the same configuration and data; arguments as of `create`.

        Where it is to have more rounds than before it has not ended any more.

        Raises:
          ValueError: there is no run, or its configuration or data differ; names the first key that does.
        """
        run = cls(path)
        cls.check_configuration(path, config_text)
        _check_same({"data": _read_json(run.path / _DATA) or {}}, {"data": data}, run.path / _DATA)
        if may_extend(read_config(path), yaml.safe_load(config_text)):
            (run.path / _SUMMARY).unlink(missing_ok=True)
            write_atomically(run.path / _CONFIG, config_text)
        return run

    def append(self, metrics: Metrics) -> None:
        """Add one line for each of the stacked rounds of `metrics`, leaves `[rounds, ...]`."""
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in _lines(metrics))
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, rounds: int) -> None:
        """Drop every line after round `rounds`, and a last line that a kill has torn.

        Raises:
          ValueError: the log ends before `rounds`, or cannot be read.
        """
        path = self.path / _METRICS
        found = len(read_metrics(self.path))
        if found < rounds:
            raise ValueError(f"{path} must hold the {rounds} rounds of the checkpoint, got {found}")
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[:rounds])))

    def write_summary(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` from the log and from `run`, whose keys are of `RUN_FIELDS` (absent: null).

        Returns:
          The summary.
        """
        unknown = sorted(set(run) - set(RUN_FIELDS))
        if unknown:
            raise ValueError(f"summary field must be one of {', '.join(RUN_FIELDS)}, got {unknown[0]}")
        told = {name: _plain(run.get(name)) for name in RUN_FIELDS}
        summary = {"initial_accuracy": told["initial_accuracy"], **summarize(read_metrics(self.path)), **told}
        write_atomically(self.path / _SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        return summary


def summarize(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a summary that the lines of `metrics.jsonl` tell."""
    accuracies, personal = (
        [line[field] for line in metrics if line[field] is not None] for field in ("eval_accuracy", "personal_accuracy")
    )
    total_s = metrics[-1]["cumulative_latency_s"] if metrics else None
    return {
        "final_accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        "personal_accuracy": personal[-1] if personal else None,
        "total_uplink_bits": sum(line["uplink_bits"] for line in metrics),
        "total_downlink_bits": sum(line["downlink_bits"] for line in metrics),
        "total_latency_s": total_s,
        "mean_latency_s": None if total_s is None else total_s / len(metrics),
        "final_queue_s": metrics[-1]["queue_s"] if metrics else None,
        "rounds": len(metrics),
    }


def may_extend(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the configuration `now` asks for more rounds than `before`, and no rate depends on their number."""
    had, has = before.get("rounds"), now.get("rounds")
    if not (type(had) is int and type(has) is int and had < has):
        return False
    return not depends_on_rounds(OptimizerConfig(**now["local"]["optimizer"]))


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run, ended or not."""
    return (Path(folder) / _CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The resolved configuration of a run.

    Raises:
      ValueError: the folder holds no run.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} must be the folder of a run, got no {_CONFIG} in it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be the YAML of a configuration, got something else")
    return config


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rounds that the log of a run holds, oldest first; a last line without its newline does not count.

    Raises:
      ValueError: there is no log, or a line is not the JSON object of the round that follows the line before.
    """
    path = Path(folder) / _METRICS
    if not path.is_file():
        raise ValueError(f"{folder} must be the folder of a run, got no {_METRICS} in it")
    metrics = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("round") != number:
            raise ValueError(f"{path} line {number} must be the JSON object of round {number}, got {line[:40]!r}")
        metrics.append(record)
    return metrics


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """The summary of a run; None as long as the run has not ended."""
    return _read_json(Path(folder) / _SUMMARY)


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError at the first key whose value is not the one that the file at `path` holds."""
    old, new = flatten(before), flatten(now)
    for key in [*new, *old]:
        had, has = (repr(tree[key]) if key in tree else "absent" for tree in (old, new))
        if had != has:
            raise ValueError(f"{key} must be {had} as in {path} to resume the run, got {has}; or choose another --out")


def _lines(metrics: Metrics) -> Iterator[dict[str, Any]]:
    columns = {name: np.asarray(getattr(metrics, attribute)) for name, attribute in FIELDS.items()}
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
