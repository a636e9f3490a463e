"""A configuration as structure and numbers: what decides about shapes and code, and what a program is given as arrays.

A field that may be swept is declared `field: float = traced(default)`. `split` takes the numbers out of a
configuration and leaves its structure, which is hashable; `fill` puts numbers, traced ones too, back in. So a method
reads `options.field` whichever it holds.

Example:
  >>> @dataclasses.dataclass(frozen=True)
  ... class Decay(Options):
  ...     name: str = "decay"
  ...     rate: float = traced(0.5)
  ...     warm: bool = True
  >>> structure, numbers = split(Decay(rate=0.25))
  >>> numbers
  {'rate': array(0.25, dtype=float32)}
  >>> fill(structure, {"rate": jnp.float32(2.0)}).rate + 1
  Array(3., dtype=float32)
"""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import numpy as np

_TRACED = "traced"

Numbers = dict[str, Any]
"""Dotted key -> float32 array: the traced numbers of a configuration."""

T = TypeVar("T")


class Hole(NamedTuple):
    """What a structure holds in place of a traced number: its shape."""

    shape: tuple[int, ...]


def traced(default: Any) -> Any:
    """A dataclass field whose number, or tuple of numbers, is traced; None and () are structure and stay."""
    return dataclasses.field(default=default, metadata={_TRACED: True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A method's options, with its name. Those whose type is a `Literal`, the name among them, are checked here.

    A class with checks of its own makes them in `__post_init__`, after `super().__post_init__()`. They see concrete
    values: `fill` does not run them.
    """

    name: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in allowed:
                words = repr(allowed[0]) if len(allowed) == 1 else f"one of {', '.join(map(str, allowed))}"
                raise ValueError(f"{field.name} must be {words}, got {value!r}")

    def needs(self) -> dict[str, str]:
        """Properties of the rest of the experiment that these values need -> the option that asks for it."""
        return {}

    def breaks(self) -> dict[str, str]:
        """Properties of the experiment that these values take away -> the option that does."""
        return {}

    def note(self, broken: Collection[str]) -> str | None:
        """One line on what these options silently turn into, where these properties are broken; None for nothing."""
        return None


def is_traced(field: dataclasses.Field) -> bool:
    """Whether a field was declared by `traced`."""
    return _TRACED in field.metadata


def traced_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the traced numbers that a configuration holds."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from traced_keys(value, f"{key}.")
        elif is_traced(field) and value is not None and not (isinstance(value, tuple) and not value):
            yield key


def split(config: T, prefix: str = "") -> tuple[T, Numbers]:
    """The structure of a configuration, with holes where numbers are traced, and these as float32 arrays.

    Args:
      config: a dataclass, with others in its fields or without.
      prefix: before each key.
    """
    numbers: Numbers = {}
    for key in traced_keys(config):
        numbers[prefix + key] = np.asarray(_get(config, key), np.float32)
    return _put_all(config, {key.removeprefix(prefix): Hole(value.shape) for key, value in numbers.items()}), numbers


def fill(config: T, numbers: Mapping[str, Any], prefix: str = "") -> T:
    """The configuration with those of the numbers whose key begins with `prefix` in their fields, unchecked.

    Args:
      config: a configuration or its structure.
      numbers: arrays, traced or not; keys as `split` gives them.
      prefix: of the keys that are meant; it is no part of the field's name.
    """
    return _put_all(config, {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)})


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _put_all(config: T, values: Mapping[str, Any]) -> T:
    """A copy with values at dotted keys."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, dot, rest = key.partition(".")
        if dot:
            nested.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    own |= {name: _put_all(getattr(config, name), inner) for name, inner in nested.items()}
    filled = copy.copy(config)
    for name, value in own.items():
        object.__setattr__(filled, name, value)  # frozen, and not to be checked
    return filled
