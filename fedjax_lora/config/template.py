"""A configuration as a file to begin with: every key in use, with what it means."""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from fedjax_lora.config.catalogue import SLOTS, Catalogue
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.config.keys import Key, keys
from fedjax_lora.config.values import key_of
from fedjax_lora.config.yaml import write_line

_WIDTH = 100

_HEAD = """\
# Every key of this experiment, with what it means. A line that is left out stands for the default.
# "sweeps" marks the numbers in which runs may differ that still share one compiled program.
"""

_Known = Mapping[tuple[str, str | None], Key]
"""Dotted key, and the method that it is of or None -> what is known of it."""


def commented(config: ExperimentConfig, catalogue: Catalogue) -> str:
    """YAML text of every key, a comment above each; `load_config` reads it as an equal configuration."""
    known = {(key.key, method): key for key in keys(catalogue) for method in key.methods or (None,)}
    return "\n".join([_HEAD, *_section(config, "", None, known), ""])


def _section(options: Any, path: str, method: str | None, known: _Known) -> Iterator[str]:
    """The lines of a section; `method` is the name of the method whose options they are."""
    indent = "  " * path.count(".")
    for field in dataclasses.fields(options):
        name, value, dotted = field.name, getattr(options, field.name), f"{path}{field.name}"
        if not dataclasses.is_dataclass(value):
            yield from _comment(known.get((dotted, None)) or known[dotted, method], indent)
            yield f"{indent}{name}: {write_line(list(value) if isinstance(value, tuple) else value)}"
            continue
        if not path:
            yield ""
        yield from _wrapped((inspect.getdoc(type(value)) or "").partition("\n")[0], indent)
        yield f"{indent}{name}:"
        yield from _section(value, f"{dotted}.", getattr(value, key_of(name)) if name in SLOTS else method, known)


def _comment(key: Key, indent: str) -> Iterator[str]:
    marks = [key.type, f"default {write_line(key.default)}", *([] if key.static else ["sweeps"])]
    yield from _wrapped(f"{key.meaning} [{'; '.join(marks)}]".strip(), indent)


def _wrapped(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start)
