"""Values of options: which types they may have, how they are read, and how they are named to a user."""

import difflib
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np

from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.mapping import Mapped

_LARGEST = float(np.finfo(np.float32).max)

_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a finite number",  # in float32
    "str": "a string",
    "NoneType": "null",
    "Mapped": "a mapping of keys",
}
_LISTS = {str: "a list of strings", int: "a list of integers", float: "a list of numbers"}


def read(value: Any, kind: Any) -> Any:
    """`value` if it is of type `kind`; an integer stands for a float, a list for a tuple.

    Raises:
      ValueError: it is of another; says what must be there.
    """
    options = members(kind)
    typed = tuple(value) if isinstance(value, list) else value
    if isinstance(value, dict) and Mapped in options:
        typed = _mapped(value)
    if type(value) is int and float in options and int not in options and abs(value) <= _LARGEST:
        typed = float(value)
    elif isinstance(typed, tuple) and tuple[float, ...] in options:
        typed = tuple(float(item) if type(item) is int and abs(item) <= _LARGEST else item for item in typed)
    if any(_is(typed, member) for member in options):
        return typed
    choices = [option for m in options if typing.get_origin(m) is Literal for option in typing.get_args(m)]
    raise ValueError(f"must be {words(kind)}, got {value!r}{near(value, choices)}")


def _mapped(value: dict[Any, Any]) -> Any:
    """A mapping from words to scalars and tuples of them; as it is where it holds something else."""
    found = Mapped({key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})
    items = [part for item in found.values() for part in (item if isinstance(item, tuple) else (item,))]
    flat = all(type(item) in (str, int, float, bool, type(None)) for item in items)
    return found if flat and all(type(key) is str for key in found) else value


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type itself."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def words(kind: Any) -> str:
    """What a type allows."""
    return " or ".join(map(_words, members(kind)))


def is_readable(kind: Any) -> bool:
    """Whether values of a type can stand in a file."""
    try:
        return bool(words(kind))
    except (KeyError, AttributeError, TypeError):
        return False


def near(value: Any, options: Iterable[Any]) -> str:
    """A hint at what may have been meant; empty where nothing is near."""
    names = [option for option in options if isinstance(option, str)]
    found = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {found[0]}?" if found else ""


def _is(value: Any, member: Any) -> bool:
    # `type(...) is` and not isinstance: True is an int to Python, and 1 == True in a Literal.
    if typing.get_origin(member) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(member))
    if typing.get_origin(member) is tuple:
        return isinstance(value, tuple) and all(_is(item, typing.get_args(member)[0]) for item in value)
    return type(value) is member and not (member is float and not abs(value) <= _LARGEST)


def _words(member: Any) -> str:
    if typing.get_origin(member) is Literal:
        options = [str(option) for option in typing.get_args(member)]
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if typing.get_origin(member) is tuple:
        kind, dots = typing.get_args(member)
        return _LISTS[kind] if dots is Ellipsis else ""
    return _WORDS[member.__name__]


def key_of(slot: str) -> str:
    """The option by which a slot's section chooses its method."""
    return "source" if slot == "data" else "name"


def field_types(cls: type) -> dict[str, Any]:
    """Field -> its type, also where annotations are text."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise ConfigError(f"options {cls.__name__} must have types that are there at run time, got {error}") from error


def one_of(names: Collection[str]) -> str:
    """What is allowed where these are; "another" where there are none."""
    words = list(dict.fromkeys(names))
    return "another" if not words else words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def word(value: Any) -> str:
    """A single value as a file has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short(value: Any) -> str:
    """What someone gave in place of something else, in at most 80 characters of one line."""
    text = value.__name__ if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
