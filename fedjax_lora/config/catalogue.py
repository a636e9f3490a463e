"""The catalogue: the one table of methods, and the rules by which they go together.

No other file of the package knows a method by its name. A method that needs a property of the experiment is refused
where another, or a value of another section, breaks it; `PROPERTIES` says what they are.
"""

import dataclasses
import functools
import importlib.metadata
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fedjax_lora.adapters import lora
from fedjax_lora.aggregation import fedex, fedit, fedsa, ffa, flexlora, flora, hetlora, lora_fair, rolora
from fedjax_lora.config import values
from fedjax_lora.config.properties import PROPERTIES
from fedjax_lora.config.properties import check as check
from fedjax_lora.config.properties import check_needs as check_needs
from fedjax_lora.config.properties import notes as notes
from fedjax_lora.config.values import key_of
from fedjax_lora.control import (
    arrival,
    fixed,
    greedy,
    ideal,
    proportional,
    schedules,
    split_lyapunov,
    tsfa_online,
    uniform,
)
from fedjax_lora.core.errors import ConfigError, reason_of
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.data import sources
from fedjax_lora.models import load
from fedjax_lora.sparsifiers import dense, flasc, lora_a2, random_rank, soft, soft_rotated, svd, top_k
from fedjax_lora.tasks import causal_lm, classification, regression, token_classification
from fedjax_lora.training import card, corrections, local, optimizers, split
from fedjax_lora.wireless import cell

METHODS: tuple[Method, ...] = (
    *sources.METHODS,
    *(module.METHOD for module in (classification, regression, token_classification, causal_lm)),
    lora.METHOD,
    load.METHOD,
    cell.METHOD,
    *(module.METHOD for module in (fixed, uniform, ideal, tsfa_online, greedy, proportional, split_lyapunov)),
    *schedules.METHODS,
    *arrival.METHODS,
    *(module.METHOD for module in (soft, soft_rotated, dense, top_k, random_rank, svd, lora_a2, flasc)),
    *(module.METHOD for module in (fedit, ffa, rolora, fedsa, hetlora, fedex, flora, flexlora, lora_fair)),
    *corrections.METHODS,
    *optimizers.METHODS,
    local.METHOD,
    split.METHOD,
    card.METHOD,
)
"""The package's own, in the order in which their records are made; the first of each slot is its default."""

SLOTS = tuple(dict.fromkeys(method.slot for method in METHODS))
"""In the order in which their records are made; each is a section of the configuration."""

GROUP = "fedjax_lora.methods"
"""The group of entry points that name methods of other packages: each a Method, or a sequence of them."""

# -------------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Methods by slot and name. `Catalogue.of()` has those that are found without being named.

    methods: of each slot the default first.
    """

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, methods: Iterable[Method] = ()) -> "Catalogue":
        """The package's own methods, those of entry points, and these.

        Raises:
          ConfigError: one is no method, or two have one name; one line.
        """
        return _catalogue(_as_tuple(methods, "methods"))

    @functools.cached_property
    def by_slot(self) -> Mapping[str, Mapping[str, Method]]:
        """Slot -> name -> method."""
        found: dict[str, dict[str, Method]] = {slot: {} for slot in SLOTS}
        for method in self.methods:
            found[method.slot][method.name] = method
        return found

    def names(self, slot: str) -> list[str]:
        """Of a slot's methods; the first is the default."""
        return list(self.by_slot[slot])

    def find(self, slot: str, name: Any) -> Method:
        """The method of that name.

        Raises:
          ConfigError: there is none; names those that there are.
        """
        names = self.names(slot)
        if name not in names:
            allowed, hint = values.one_of(names), values.near(name, names)
            raise ConfigError(f"{slot}.{key_of(slot)} must be {allowed}, got {name!r}{hint}")
        return self.by_slot[slot][name]

    def chosen(self, config: Any) -> dict[str, Method]:
        """Slot -> the method that an ExperimentConfig chooses, in the order in which records are made.

        Raises:
          ConfigError: one is not in the catalogue.
        """
        found = {}
        for slot in SLOTS:
            options = getattr(config, slot)
            found[slot] = method = self.find(slot, getattr(options, key_of(slot)))
            if type(options) is not method.options:
                where = f"where {slot}.{key_of(slot)} is {method.name}"
                kinds = method.options.__name__, type(options).__name__
                raise ConfigError(f"{slot} must be of class {kinds[0]} {where}, got {kinds[1]}")
        return found


@functools.lru_cache(maxsize=16)
def _catalogue(methods: tuple[Method, ...]) -> Catalogue:
    own = set(METHODS)
    added = tuple(method for method in dict.fromkeys((*_of_entry_points(), *methods)) if method not in own)
    seen = {(method.slot, method.name) for method in METHODS}
    for method in added:
        _check_method(method)
        if (method.slot, method.name) in seen:
            raise ConfigError(f"method {method.name!r} must be there once in slot {method.slot}, got two of that name")
        seen.add((method.slot, method.name))
    return Catalogue(METHODS + added)


@functools.cache
def _of_entry_points() -> tuple[Method, ...]:
    found: list[Method] = []
    for point in importlib.metadata.entry_points(group=GROUP):
        what = f"entry point {point.name} of group {GROUP}"
        try:
            held = point.load()
        except Exception as error:  # another package's code
            raise ConfigError(f"{what} must be importable, got {type(error).__name__}: {reason_of(error)}") from error
        found += _as_tuple(held, what)
    return tuple(found)


def _as_tuple(held: Any, what: str) -> tuple[Method, ...]:
    """A method or a sequence of methods as a tuple."""
    methods = (held,) if isinstance(held, Method) else held
    try:
        listed = tuple(methods)
    except TypeError:
        listed = (held,)
    for method in listed:
        if not isinstance(method, Method):
            raise ConfigError(f"{what} must hold fedjax_lora.methods.Method alone, got {values.short(method)}")
    return listed


def _check_method(method: Method) -> None:
    """Refuse a method that no configuration could choose."""
    if method.slot not in SLOTS:
        hint = values.near(method.slot, SLOTS)
        raise ConfigError(f"slot of method {method.name!r} must be {values.one_of(SLOTS)}, got {method.slot!r}{hint}")
    name = f"method {method.name!r} of slot {method.slot}"
    if not callable(method.make):
        raise ConfigError(f"make of {name} must be a function of options and Context, got {values.short(method.make)}")
    _check_options(method, name)
    for what in ("needs", "breaks"):
        for unknown in sorted(getattr(method, what) - PROPERTIES.keys()):
            allowed, hint = values.one_of(PROPERTIES), values.near(unknown, PROPERTIES)
            raise ConfigError(f"{what} of {name} must be {allowed}, got {unknown!r}{hint}")


def _check_options(method: Method, name: str) -> None:
    key, options = key_of(method.slot), method.options
    parameters = getattr(options, "__dataclass_params__", None)
    if not isinstance(options, type) or parameters is None or not parameters.frozen:
        raise ConfigError(f"options of {name} must be a frozen dataclass, got {values.short(options)}")
    if key == "name" and not issubclass(options, Options):
        raise ConfigError(f"options of {name} must be a subclass of Options, got {values.short(options)}")
    fields, types = {field.name: field for field in dataclasses.fields(options)}, values.field_types(options)
    allowed = typing.get_args(types[key]) if key in fields and typing.get_origin(types[key]) is Literal else ()
    if key not in fields or method.name not in (*allowed, fields[key].default):
        got = f"{key} = {values.short(fields[key].default)}" if key in fields else f"no {key}"
        raise ConfigError(f"options of {name} must have {key} = {method.name!r} by default, got {got}")
    for field in fields:
        if not dataclasses.is_dataclass(types[field]) and not values.is_readable(types[field]):
            got = values.short(types[field])
            raise ConfigError(f"option {field} of {name} must be of a type that a file can hold, got {got}")
