"""Configuration text: YAML with the scalars of YAML 1.2, in which no key is silently there twice."""

import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedjax_lora.core.errors import ConfigError, reason_of
from fedjax_lora.core.mapping import Mapped


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


_CORE: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _integer),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
}
"""The core schema of YAML 1.2: type -> how its scalars are written, their first characters, their value.

In YAML 1.1, which PyYAML reads by itself, `010` is 8, `1:30` is 90, `no` is false, a date is no string, and `1e-3` is.
"""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for the core schema, and without its silence on a key that is there twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own form
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.deep_construct = True  # a value that holds itself is an error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key that is not a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key_node.value!r} twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the strings that YAML 1.2 would read as something else."""


_Dumper.add_representer(Mapped, yaml.SafeDumper.represent_dict)


def _constructor(pattern: re.Pattern[str], value: Callable[[str], Any]) -> Callable[[_Loader, Any], Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not pattern.match(text):  # an explicit tag
            raise yaml.MarkedYAMLError(None, None, f"{text!r} with the tag {node.tag}", node.start_mark)
        return value(text)

    return construct


for _name, (_written, _first, _value) in _CORE.items():
    _tag, _pattern = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_written})\Z")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, [*_first, *([""] if _name == "null" else [])])
    _Loader.add_constructor(_tag, _constructor(_pattern, _value))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])


def parse_value(text: str, what: str) -> Any:
    """YAML text as `load_config` reads it; `what` names it in the error."""
    try:
        return yaml.load(text, _Loader)  # a subclass of the safe loader
    except RecursionError:
        raise ConfigError(f"{what} must be valid YAML, got one that is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of too many digits
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{what}{where} must be valid YAML, got {problem}") from error


def write_value(value: Any) -> str:
    """YAML text that `parse_value` reads as `value`; a reader of YAML 1.1 does too."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def write_line(value: Any) -> str:
    """As `write_value`, of a value without mappings, in one line."""
    options: dict[str, Any] = {"Dumper": _Dumper, "default_flow_style": True, "width": float("inf")}
    text = yaml.dump(value, **options).removesuffix("...\n").strip()
    # A text of several lines is one in double quotes.
    return text if "\n" not in text else yaml.dump(value, default_style='"', **options).strip()


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a path with a NUL
        reason = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else reason_of(error)
        raise ConfigError(f"configuration {path} must be a readable file, got {reason}") from error
    given = parse_value(text, f"configuration {path}")
    if given is None:
        raise ConfigError(f"configuration {path} must be a mapping of keys, got an empty configuration file")
    if not isinstance(given, dict):
        raise ConfigError(f"configuration {path} must be a mapping of keys, got {given!r}")
    return given


def read_override(override: str) -> dict[str, Any]:
    """The nested dict that `a.b=value` stands for."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"override must be of the form key=value, got {override!r}")
    value = parse_value(text, f"override {override!r}")
    for key in reversed(dotted.strip().split(".")):
        value = {key: value}
    return value


def merge(
    below: Mapping[str, Any], above: Mapping[str, Any], variants: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`above` laid over `below`, level by level; another name replaces the whole of a section.

    Args:
      below, above: nested.
      variants: section -> the key that holds its name.
    """
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(under, dict):
            renamed = _is_renamed(under, value, (variants or {}).get(key))
            merged[key] = value if renamed else merge(under, value)
    return merged


def _is_renamed(below: Mapping[str, Any], above: Mapping[str, Any], name: str | None) -> bool:
    return name is not None and name in below and name in above and below[name] != above[name]
