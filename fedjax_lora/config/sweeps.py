"""What a sweep varies: settings of keys, as a grid, as random draws, as a list, or all of them together.

A sweep file in YAML has up to four sections, and a trial is made of one element of each:

    grid: {control.V: [1, 3, 10], seed: [0, 1, 2]}     # every combination
    random:                                            # so many draws
      trials: 8
      seed: 0
      over: {local.optimizer.learning_rate: {log: [1e-4, 1e-2]}, lora.alpha: {uniform: [4, 16]}, lora.rank: [4, 8]}
    list: [{sparsifier: soft}, {sparsifier: top_k, control.keep_ratio: 0.25}]
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lora.config.yaml import parse_value, read
from fedjax_lora.core.errors import ConfigError

Setting = dict[str, Any]
"""Dotted key -> value of one trial."""

_SECTIONS = ("grid", "random", "list")
_LONGEST_NAME = 100
_PLAIN = re.compile(r'[A-Za-z][\w.]*=[a-z0-9_.,:+"\[\]{} -]*', re.ASCII)  # values without capitals: cases may be one


def parse_over(over: Iterable[str]) -> dict[str, list[Any]]:
    """Key -> values, of `key=[v1, v2, ...]` each.

    Raises:
      ConfigError: one is of another form, or names a key twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        values = parse_value(listed, f"sweep {text!r}") if equals else None
        if not isinstance(values, list) or not values or not key.strip():
            raise ConfigError(f"sweep must be over key=[value, value, ...], got {text!r}")
        if key.strip() in axes:
            raise ConfigError(f"sweep must be over each key once, got {key.strip()!r} twice")
        axes[key.strip()] = values
    return axes


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination, the last key's values varying fastest.

    Raises:
      ConfigError: a key has no values, or one of them twice.
    """
    for key, values in axes.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"sweep must be over a list of values of {key}, got {values!r}")
        given = [override(key, value) for value in values]
        if twice := next((text for text in given if given.count(text) > 1), None):
            raise ConfigError(f"sweep must be over each value once, got {twice} twice")
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def read_sweep(path: str | Path) -> list[Setting]:
    """The settings that a sweep file describes, see above.

    Raises:
      ConfigError: names the section, what it got and what is allowed.
    """
    held = read(Path(path))
    if unknown := [name for name in held if name not in _SECTIONS]:
        raise ConfigError(f"{path} must have the sections {', '.join(_SECTIONS)}, got {unknown[0]!r}")
    if not held:
        raise ConfigError(f"{path} must have one of the sections {', '.join(_SECTIONS)}, got none")
    parts = [
        grid(_mapping(held.get("grid") or {}, "grid")),
        _listed(held["list"]) if "list" in held else [{}],
        _random(_mapping(held["random"], "random")) if "random" in held else [{}],
    ]
    return product(*parts)


def product(*parts: Sequence[Setting]) -> list[Setting]:
    """Settings of one element of each part.

    Raises:
      ConfigError: two parts vary one key.
    """
    keys = [key for part in parts for key in dict.fromkeys(key for setting in part for key in setting)]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"sweep must be over each key once, got {twice!r} twice")
    chosen = itertools.product(*parts)
    return [{key: value for setting in settings for key, value in setting.items()} for settings in chosen]


def _mapping(value: Any, section: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{section} must be a mapping of a sweep, got {value!r}")
    return value


def _listed(value: Any) -> list[Setting]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"list must be a list of mappings key: value of a sweep, got {value!r}")
    return value


def _random(section: Mapping[str, Any]) -> list[Setting]:
    """So many draws, each key's own: the same for one seed, whatever the other keys; those that repeat are left out."""
    if unknown := [name for name in section if name not in ("trials", "seed", "over")]:
        raise ConfigError(f"random must have trials, seed and over, got {unknown[0]!r}")
    over = _mapping(section.get("over"), "random.over")
    trials, seed = (_whole(section, name, least) for name, least in (("trials", 1), ("seed", 0)))
    drawn = {key: _draws(key, spread, trials, seed) for key, spread in over.items()}
    settings = [{key: values[i] for key, values in drawn.items()} for i in range(trials)]
    return list({str(overrides(setting)): setting for setting in settings}.values())


def _whole(section: Mapping[str, Any], name: str, least: int) -> int:
    value = section.get(name, 0)
    if type(value) is not int or value < least:
        raise ConfigError(f"random.{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _draws(key: str, spread: Any, trials: int, seed: int) -> list[Any]:
    """Values of one key: from a list, or by `{uniform: [low, high]}` or `{log: [low, high]}`."""
    digest = hashlib.sha256(key.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:4], "big")])
    if isinstance(spread, list) and spread:
        return [spread[i] for i in rng.integers(len(spread), size=trials)]
    if isinstance(spread, dict) and len(spread) == 1:
        ((kind, ends),) = spread.items()
        numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        if kind in ("uniform", "log") and numbers and ends[0] < ends[1] and (kind == "uniform" or ends[0] > 0):
            low, high = map(math.log, ends) if kind == "log" else ends
            found = rng.uniform(low, high, size=trials)
            return [float(f"{math.exp(x) if kind == 'log' else x:.6g}") for x in found]
    raise ConfigError(
        f"random.over.{key} must be a list, {{uniform: [low, high]}} or {{log: [low, high]}} with low < high, "
        f"got {spread!r}"
    )


def override(key: str, value: Any) -> str:
    """`key=value` as the command line takes it."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def overrides(setting: Setting) -> list[str]:
    """A setting as the command line takes it."""
    return [override(key, value) for key, value in setting.items()]


def folder_name(setting: Setting) -> str:
    """The overrides themselves where they are short and plain, else their beginning and a hash of them all.

    Different settings of the same keys have different names, on file systems that take capitals for small letters too.
    """
    given = overrides(setting)
    name = ",".join(given) or "default"
    if len(name) <= _LONGEST_NAME and all(map(_PLAIN.fullmatch, given)):
        return name
    digest = "~" + hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]
    start = re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII).lstrip(".-")
    return start[: _LONGEST_NAME - len(digest)] + digest
