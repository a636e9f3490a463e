"""What the folder of a run holds, read back: nothing that was changed or damaged is taken for a run's own."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_lora.config import yaml as reading
from fedjax_lora.io import sealed

CONFIG, DATA, METRICS, SUMMARY = "config.yaml", "data.json", "metrics.jsonl", "summary.json"

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
    "absent_weight": "absent_weight",
    "outages": "outages",
    "nonfinite_clients": "nonfinite_clients",
    "sparsification_error": "sparsification_error",
    "covariance_error": "covariance_error",
    "orthogonality": "orthogonality",
    "dropped_energy": "dropped_energy",
    "tail_energy": "tail_energy",
}
"""Field of a line of `metrics.jsonl` -> attribute of `Metrics`, in the order of the line."""

_COUNTS = {"round", "uplink_bits", "downlink_bits", "participants", "outages", "nonfinite_clients"}
_PROFILES = {"tail_energy"}


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run, ended or not."""
    return (Path(folder) / CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The resolved configuration of a run.

    Raises:
      ValueError: the folder holds no run, or its configuration is not the YAML of one.
    """
    if not is_run(folder):
        raise ValueError(f"{folder} must be the folder of a run, got no {CONFIG} in it")
    return reading.read(Path(folder) / CONFIG)


def check_config(folder: str | Path) -> None:
    """Refuse a `config.yaml` that is not the one that the run was started with, or continued with since.

    Raises:
      ValueError: it was changed, or is missing, as `data.json` may be.
    """
    path = Path(folder) / CONFIG
    if not is_run(folder):
        raise ValueError(f"{folder} must be the folder of a run, got no {CONFIG} in it")
    if hashlib.sha256(path.read_bytes()).hexdigest() not in read_data(folder).get("config_sha256", []):
        raise ValueError(f"{path} must be as it was when the run was started, got one that was changed")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rounds that the log of a run holds, oldest first; a last line without its newline does not count.

    Each is a dict of `FIELDS`, and of `slot/name` for what else the methods report: a whole number where something is
    counted, a list for the importance profile, else a number; null for a number that was not measured or is not finite.

    Raises:
      ValueError: there is no log, or a line is not of the round that follows the line before; names file and line.
    """
    metrics = []
    for number, line in enumerate(whole_lines(folder), start=1):
        try:
            metrics.append(_round(line, number))
        except ValueError as error:
            raise ValueError(f"{Path(folder) / METRICS} line {number} {error}") from None
    return metrics


def _round(line: bytes, number: int) -> dict[str, Any]:
    """The record of round `number`; ValueError says what its line must be and is not."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("round") != number:
        raise ValueError(f"must be the JSON object of round {number}, got {line[:40]!r}")
    named = {name for name in record if "/" not in name}
    if odd := sorted(FIELDS.keys() ^ named):
        got = repr(odd[0]) if odd[0] in record else f"no {odd[0]!r}"
        raise ValueError(f"must hold {len(FIELDS)} fields, of a round and no others, got {got}")
    for name, value in record.items():
        if wanted := _unmet(name, value):
            raise ValueError(f"must hold {wanted} as {name!r}, got {str(value)[:40]!r}")
    return record


def _unmet(name: str, value: Any) -> str | None:
    """What a field must be and `value` is not; None where it is."""
    if name in _COUNTS:
        return None if type(value) is int and 0 <= value <= sys.float_info.max else "a whole number"
    if name in _PROFILES:
        return None if isinstance(value, list) and all(map(_is_number_or_null, value)) else "a list of numbers"
    return None if _is_number_or_null(value) else "a number or null"


def _is_number_or_null(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def whole_lines(folder: str | Path) -> list[bytes]:
    """Lines of a run's log with their newlines, but for a last one without.

    Raises:
      ValueError: there is no log.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(f"{folder} must be the folder of a run, got no {METRICS} in it")
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]  # bytes.splitlines splits at others too


def check_log(folder: str | Path, summary: Mapping[str, Any]) -> None:
    """Refuse a log that is not the one that a summary was made of.

    Raises:
      ValueError: a line has changed or is missing.
    """
    if log_sha256(folder, summary["rounds"]) != summary["metrics_sha256"]:
        raise ValueError(f"{Path(folder) / METRICS} must be as it was when the run ended, got one that was changed")


def log_sha256(folder: str | Path, rounds: int) -> str | None:
    """Hash of the first lines of a log; None where it holds fewer."""
    lines = whole_lines(folder)
    return hashlib.sha256(b"".join(lines[:rounds])).hexdigest() if len(lines) >= rounds else None


def read_data(folder: str | Path) -> dict[str, Any]:
    """What a run was started with: `data.json`.

    `examples_hash`, `partition_hash`, `base_hash`, `model_config_hash`, `tokenizer_hash`: of the data and of the model.
    `class_names`: of the columns of the task head. `started`: when, ISO 8601. `commit`: of the Git repository that the
    run was started in, or null. `columns`: role -> column of the data; of runs before it was noted there is none.
    `config_sha256`: of each `config.yaml` that the run has had. `methods`: file or module
    of a user's own methods -> SHA-256 of its text.

    Raises:
      ValueError: it is missing, or was changed since.
    """
    found = sealed.read(Path(folder) / DATA)
    if found is None:
        raise ValueError(f"{folder} must be the folder of a run, got no {DATA} in it")
    return found


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """The summary of a run; None as long as the run has not ended.

    Raises:
      ValueError: it was changed since.
    """
    return sealed.read(Path(folder) / SUMMARY)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
