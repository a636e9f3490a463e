"""JSON files that carry a hash of their own content: one that was changed since is not believed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_lora.io.files import write_atomically

_SEAL = "sha256"


def write(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write `fields`, and `sha256` of them as the last one; in full or not at all. Returns what the file holds."""
    sealed = {**fields, _SEAL: _digest(fields)}
    write_atomically(path, json.dumps(sealed, indent=2, allow_nan=False) + "\n")
    return sealed


def read(path: Path) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no file.

    Raises:
      ValueError: the file was changed or damaged since, or written by a version that did not seal it.
    """
    if not path.is_file():
        return None
    changed = f"{path} must be as it was written, got a file that was changed or damaged since"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        digest = _digest({name: value for name, value in fields.items() if name != _SEAL})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(changed) from error
    if _SEAL not in fields:
        raise ValueError(f"{path} must hold the {_SEAL} of its content, got a file written by an older version")
    if fields[_SEAL] != digest:
        raise ValueError(changed)
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()
