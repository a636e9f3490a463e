"""Every key of a configuration: its type, its default, what it means, and whether it is a number that may be swept.

What a key means is said once, in the docstring of the class that has it, in lines of the form `name: meaning`.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from fedjax_lora.config import values
from fedjax_lora.config.catalogue import SLOTS, Catalogue
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.config.values import key_of
from fedjax_lora.core.numbers import is_traced

_CODE = "a choice of code"
_SHAPE = "a shape"
_LENGTH = "a number of steps of the program"
_HOST = "used on the host, before the program"
_AROUND = "used on the host, around the program"

STATIC = {
    "seed": "the run's key, and who holds which examples",
    "rounds": _LENGTH,
    "model.pretrained": _HOST,
    "model.dropout": _CODE,
    "pretrain": _HOST,
    "lora.max_rank": _SHAPE,
    "lora.targets": _SHAPE,
    "lora.rank_pattern": _SHAPE,
    "lora.alpha_pattern": _CODE,
    "lora.initial": _HOST,
    "data": _HOST,
    "clients.count": _SHAPE,
    "clients.per_round": _SHAPE,
    "clients.partition": _HOST,
    "training.device_layers": _SHAPE,
    "training.tail_layers": _SHAPE,
    "local.steps": _LENGTH,
    "local.batch_size": _SHAPE,
    "wireless.retransmissions": _LENGTH,
    "arrival.buffer": _SHAPE,
    "engine": _AROUND,
    "plan": "used by `fedjax-lora plan` alone",
}
"""Key, or beginning of keys, that is no traced number -> why; words and truth values are a choice of code."""


class Key(NamedTuple):
    """A key of the configuration.

    key: dotted. methods: names of the methods of its section that have it; () for a section without.
    type: what is allowed, in words. default: None too where there is none. meaning: in one line.
    static: why it does not sweep; None for a traced number, which does.
    """

    key: str
    methods: tuple[str, ...]
    type: str
    default: Any
    meaning: str
    static: str | None

    @property
    def label(self) -> str:
        """The key, with the methods that have it."""
        return f"{self.key} ({', '.join(self.methods)})" if self.methods else self.key


def keys(catalogue: Catalogue) -> list[Key]:
    """All keys, of every method of the catalogue too, in the order of a configuration."""
    found: list[Key] = []
    for field in dataclasses.fields(ExperimentConfig):
        if field.name in SLOTS:
            found += _of_slot(field.name, catalogue)
        else:
            found += _of_field(ExperimentConfig, field, "")
    return found


def meanings(cls: type) -> dict[str, str]:
    """Field -> what the docstrings of a class and of those that it is made from say of it, in one line."""
    names = [field.name for field in dataclasses.fields(cls)]
    entry = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    starts = re.compile(rf"(?:^|(?<=[.;] ))((?:{entry})(?:, (?:{entry}))*): ", re.MULTILINE)
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__doc__ and dataclasses.is_dataclass(base)]):
        text = re.sub(r"\n[ \t]+", " ", inspect.cleandoc(base.__doc__ or ""))
        matches = list(starts.finditer(text))
        for match, after in zip(matches, [*matches[1:], None], strict=False):
            said = text[match.end() : after.start() if after else None].split("\n")[0].strip()
            found |= dict.fromkeys(match[1].split(", "), said)
    return found


def _of_slot(slot: str, catalogue: Catalogue) -> list[Key]:
    """The key that chooses a method, and the options of each; what several share is one."""
    chooses, names = key_of(slot), catalogue.names(slot)
    found = [Key(f"{slot}.{chooses}", (), values.one_of(names), names[0], "which method is taken", _CODE)]
    shared: dict[Key, list[str]] = {}
    for name, method in catalogue.by_slot[slot].items():
        for field in dataclasses.fields(method.options):
            if field.name != chooses:
                for key in _of_field(method.options, field, f"{slot}."):
                    shared.setdefault(key, []).append(name)
    return found + [key._replace(methods=tuple(names)) for key, names in shared.items()]


def _of_field(cls: type, field: dataclasses.Field, prefix: str) -> Iterator[Key]:
    kind, key = values.field_types(cls)[field.name], f"{prefix}{field.name}"
    if dataclasses.is_dataclass(kind):
        for inner in dataclasses.fields(kind):
            yield from _of_field(typing.cast(type, kind), inner, f"{key}.")
        return
    static = None if is_traced(field) else _reason(key, kind)
    yield Key(key, (), values.words(kind), _default(field), meanings(cls).get(field.name, ""), static)


def _reason(key: str, kind: Any) -> str:
    """Why a key is static: by the table, else by its type."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if reason := STATIC.get(".".join(parts[:length])):
            return reason
    words = (bool, str, type(None))
    chosen = all(member in words or typing.get_origin(member) is Literal for member in values.members(kind))
    return _CODE if chosen else "not declared as traced"


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
