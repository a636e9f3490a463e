"""The keys of a configuration as a user reads them."""

import fnmatch
import textwrap
from collections.abc import Sequence
from typing import Any

from fedjax_lora.config import values
from fedjax_lora.config.keys import Key
from fedjax_lora.config.yaml import write_line
from fedjax_lora.core.errors import ConfigError

_WIDTH = 100


def select(keys: Sequence[Key], pattern: str | None) -> list[Key]:
    """Those whose key has a part, or is of a pattern with `*`, `?` or `[...]`; all without one.

    Raises:
      ConfigError: there is none.
    """
    if pattern is None:
        return list(keys)
    wild = any(letter in pattern for letter in "*?[")
    found = [key for key in keys if (fnmatch.fnmatchcase(key.key, pattern) if wild else pattern in key.key)]
    if not found:
        hint = values.near(pattern, [*(key.key for key in keys), *(key.key.split(".")[-1] for key in keys)])
        raise ConfigError(f"PATTERN must be of a key, got {pattern!r}{hint}")
    return found


def listing(keys: Sequence[Key]) -> str:
    """A line for each key, and what it means below."""
    lines = []
    for key in keys:
        sweeps = "sweeps" if key.static is None else f"static: {key.static}"
        lines.append(f"{key.label}: {key.type}; default {write_line(key.default)}; {sweeps}")
        lines += textwrap.wrap(key.meaning, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def document(keys: Sequence[Key]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [key._asdict() | {"sweeps": key.static is None} for key in keys]
