"""Dataclasses from nested dicts: strict, by the types of their fields, with the methods of a catalogue."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import cattrs
from cattrs.errors import ClassValidationError
from cattrs.gen import make_dict_structure_fn

from fedjax_lora.config import values
from fedjax_lora.config.catalogue import SLOTS, Catalogue
from fedjax_lora.config.problems import problem
from fedjax_lora.config.values import key_of
from fedjax_lora.core.errors import ConfigError

T = TypeVar("T")


def structure(raw: dict[str, Any], cls: type[T], catalogue: Catalogue) -> T:
    """An object of a class whose fields that are named as slots hold the options of methods.

    Raises:
      ConfigError: the first thing that is wrong, in one line.
    """
    for slot in SLOTS:
        given = raw[slot]
        if not isinstance(given, dict):
            names = ", ".join(catalogue.names(slot))
            raise ConfigError(f"{slot} must be a mapping of keys or one of {names}, got {given!r}")
        catalogue.find(slot, given.get(key_of(slot)))
    try:
        return _reader(cls, catalogue)(raw, cls)
    except ClassValidationError as error:
        raise ConfigError(problem(error, raw, cls, catalogue)) from error


@functools.lru_cache(maxsize=16)
def _reader(cls: type, catalogue: Catalogue) -> Callable[[Any, Any], Any]:
    slots: dict[str, Any] = {slot: cattrs.override(struct_hook=_options(slot, catalogue)) for slot in SLOTS}
    return make_dict_structure_fn(cls, _CONVERTER, _cattrs_forbid_extra_keys=True, **slots)


def _options(slot: str, catalogue: Catalogue) -> Callable[[Any, Any], Any]:
    """How a slot's section is read: as the options of the method that it names."""

    def read(value: Any, _: Any) -> Any:
        return _CONVERTER.structure(value, catalogue.find(slot, value[key_of(slot)]).options)

    return read


def _section(cls: type, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """How a dataclass is read."""
    fields = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)
    return lambda value, _: fields(_mapping(value), cls)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of keys, got {value!r}")
    return value


_CONVERTER = cattrs.Converter()
# The last hook whose predicate holds is the one taken.
_CONVERTER.register_structure_hook_func(lambda _: True, values.read)
_CONVERTER.register_structure_hook_factory(dataclasses.is_dataclass, _section)
for _scalar in (bool, int, float, str):  # hooks of single types go before predicates
    _CONVERTER.register_structure_hook(_scalar, values.read)
