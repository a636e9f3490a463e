"""What is wrong with a configuration, in one line: the dotted key, what it got and what is allowed."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from fedjax_lora.config import values
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.values import key_of


def problem(error: Exception, raw: Any, cls: type, catalogue: Catalogue) -> str:
    """The first thing that is wrong with `raw`, which `cls` could not be made of."""
    return _problem(error, raw, "", cls, catalogue)


def _problem(error: Exception, raw: Any, path: str, root: type, catalogue: Catalogue) -> str:
    if not isinstance(error, ClassValidationError):
        return f"{path} {error}"
    within, at_class = error.group_exceptions()
    for own in at_class:
        if isinstance(own, ForbiddenExtraKeysError):
            return _unknown_key(own, raw, path, root, catalogue)
    for inner, note in within:
        key = _join(path, note.name)
        if isinstance(inner, KeyError) and note.name not in raw:
            return f"{key} must be given{_of(path, raw, catalogue)}: {values.words(note.type)}"
        return _problem(inner, raw[note.name], key, root, catalogue)
    # What is left is the class's own check, whose message begins with the field.
    return _join(path, str(at_class[0]))


def _of(path: str, raw: Any, catalogue: Catalogue) -> str:
    return f" where {path}.{key_of(path)} is {raw[key_of(path)]}" if path in catalogue.by_slot else ""


def _unknown_key(
    error: ForbiddenExtraKeysError, raw: Mapping[str, Any], path: str, root: type, catalogue: Catalogue
) -> str:
    key = min(error.extra_fields, key=str)
    dotted, got = _join(path, key), f"got it with value {raw[key]!r}"
    others = _keys_of_methods(path, catalogue)
    chooses = _join(path, key_of(path))
    if key in others:
        return f"{dotted} is a key of {chooses} = {', '.join(others[key])}, not of {raw[key_of(path)]}; {got}"
    valid = [field.name for field in dataclasses.fields(error.cl)]
    near = [_join(path, name) for name in difflib.get_close_matches(str(key), valid, n=1)]
    near = near or _elsewhere(key, path, root)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif other := difflib.get_close_matches(str(key), others, n=1):
        hint = f"did you mean {_join(path, other[0])}, a key of {chooses} = {', '.join(others[other[0]])}?"
    else:
        hint = f"valid keys are {', '.join(valid)}"
    return f"{dotted} is not a known key, {got}; {hint}"


def _keys_of_methods(slot: str, catalogue: Catalogue) -> dict[str, list[str]]:
    """Option -> names of the methods of a slot that have it."""
    keys: dict[str, list[str]] = {}
    for name, method in catalogue.by_slot.get(slot, {}).items():
        for field in dataclasses.fields(method.options):
            keys.setdefault(field.name, []).append(name)
    return keys


def _elsewhere(key: Any, path: str, root: type) -> list[str]:
    """Dotted keys of other sections that end in `key`; only those below `path` where there are such."""
    found = [name for name in _all_keys(root()) if name.split(".")[-1] == key]
    found = [name for name in found if name != _join(path, key)]
    return [name for name in found if path and name.startswith(f"{path}.")] or found


def _all_keys(config: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), _join(path, field.name)
        if dataclasses.is_dataclass(value):
            yield from _all_keys(value, name)
        else:
            yield name


def _join(path: str, key: Any) -> str:
    word = str(key) if str(key).isprintable() else repr(key)
    return f"{path}.{word}" if path else word
