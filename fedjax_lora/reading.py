"""Configuration text: YAML in which `1e-3` is a number and no key is silently there twice."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A user's mistake in a configuration, in one line."""


class Notice(UserWarning):
    """What a user should know, in one line."""


class ConfigWarning(Notice):
    """What a configuration turns into without saying so, in one line."""


class RunWarning(Notice):
    """What a run came upon, in one line."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with YAML 1.2's floats, and without its silence on a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key that is not a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key_node.value!r} twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_value(text: str, what: str) -> Any:
    """YAML text as `load_config` reads it; `what` names it in the error."""
    try:
        return yaml.load(text, _Loader)  # a subclass of the safe loader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{what}{where} must be valid YAML, got {problem}") from error


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "bytes that are not UTF-8"
        raise ConfigError(f"configuration {path} must be a readable file, got {reason}") from error
    given = parse_value(text, f"configuration {path}")
    if given is None:
        raise ConfigError(f"configuration {path} must be a mapping of keys, got an empty configuration file")
    if not isinstance(given, dict):
        raise ConfigError(f"configuration {path} must be a mapping of keys, got {given!r}")
    return given


def put(tree: dict[str, Any], override: str) -> None:
    """Put the value of `a.b=value` into nested dicts."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"override must be of the form key=value, got {override!r}")
    *parents, last = dotted.strip().split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = parse_value(text, f"override {override!r}")
