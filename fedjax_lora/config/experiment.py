"""The configuration of an experiment: one frozen dataclass, composed of each module's own, and its YAML form.

A file names only what differs from the defaults. Reading is strict: every key must exist and every value must be
of its field's type, with two liberties: an integer stands for a float, and the name of a variant for its section, as
in `sparsifier: dense`. Scalars are those of YAML 1.2. Whatever is wrong ends in one `ConfigError` of one line.
"""

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import cattrs
import numpy as np
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.aggregation.fedex import FedExConfig
from fedjax_lora.aggregation.fedit import FedItConfig
from fedjax_lora.aggregation.fedsa import FedSaConfig
from fedjax_lora.aggregation.ffa import FfaConfig
from fedjax_lora.aggregation.flexlora import FlexLoraConfig
from fedjax_lora.aggregation.flora import FloraConfig
from fedjax_lora.aggregation.hetlora import HetLoraConfig
from fedjax_lora.aggregation.lora_fair import LoraFairConfig
from fedjax_lora.aggregation.rolora import RoLoraConfig
from fedjax_lora.config.compatibility import check
from fedjax_lora.config.yaml import merge, read, read_override, write_value
from fedjax_lora.control.baselines import FixedConfig, IdealConfig, UniformConfig
from fedjax_lora.control.budgeted import GreedyConfig, ProportionalConfig
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.errors import ConfigError as ConfigError
from fedjax_lora.core.errors import ConfigWarning as ConfigWarning
from fedjax_lora.data.partition import ClientsConfig
from fedjax_lora.data.sources import DataConfig
from fedjax_lora.models.load import ModelConfig
from fedjax_lora.planning.rank_search import PlanConfig
from fedjax_lora.sim.engine import EngineConfig
from fedjax_lora.sparsifiers.dense import DenseConfig
from fedjax_lora.sparsifiers.flasc import FlascConfig
from fedjax_lora.sparsifiers.lora_a2 import LoraA2Config
from fedjax_lora.sparsifiers.random_rank import RandomRankConfig
from fedjax_lora.sparsifiers.soft import SoftConfig
from fedjax_lora.sparsifiers.soft_rotated import SoftRotatedConfig
from fedjax_lora.sparsifiers.svd import SvdConfig
from fedjax_lora.sparsifiers.top_k import TopKConfig
from fedjax_lora.sparsifiers.wire import WireConfig
from fedjax_lora.training.corrections import FedProxConfig, NoDriftConfig, ScaffoldConfig
from fedjax_lora.training.local import LocalConfig
from fedjax_lora.training.optimizers import FedAdamConfig, FedAvgConfig, FedAvgMConfig, FedYogiConfig
from fedjax_lora.training.pretrain import PretrainConfig
from fedjax_lora.wireless.cell import WirelessConfig

SparsifierConfig = (
    DenseConfig
    | SoftConfig
    | SoftRotatedConfig
    | TopKConfig
    | RandomRankConfig
    | SvdConfig
    | LoraA2Config
    | FlascConfig
)
AggregationConfig = (
    FedItConfig
    | FfaConfig
    | RoLoraConfig
    | FedSaConfig
    | HetLoraConfig
    | FedExConfig
    | FloraConfig
    | FlexLoraConfig
    | LoraFairConfig
)
DriftConfig = NoDriftConfig | FedProxConfig | ScaffoldConfig
ServerConfig = FedAvgConfig | FedAvgMConfig | FedAdamConfig | FedYogiConfig
ControlConfig = IdealConfig | UniformConfig | FixedConfig | TsfaConfig | GreedyConfig | ProportionalConfig

VARIANTS: dict[str, dict[str, type]] = {
    "sparsifier": {
        "soft": SoftConfig,
        "soft_rotated": SoftRotatedConfig,
        "dense": DenseConfig,
        "top_k": TopKConfig,
        "random_rank": RandomRankConfig,
        "svd": SvdConfig,
        "lora_a2": LoraA2Config,
        "flasc": FlascConfig,
    },
    "aggregation": {
        "fedit": FedItConfig,
        "ffa": FfaConfig,
        "rolora": RoLoraConfig,
        "fedsa": FedSaConfig,
        "hetlora": HetLoraConfig,
        "fedex": FedExConfig,
        "flora": FloraConfig,
        "flexlora": FlexLoraConfig,
        "lora_fair": LoraFairConfig,
    },
    "drift": {"none": NoDriftConfig, "fedprox": FedProxConfig, "scaffold": ScaffoldConfig},
    "server": {"sgd": FedAvgConfig, "momentum": FedAvgMConfig, "adam": FedAdamConfig, "yogi": FedYogiConfig},
    "control": {
        "fixed": FixedConfig,
        "uniform": UniformConfig,
        "ideal": IdealConfig,
        "tsfa": TsfaConfig,
        "greedy": GreedyConfig,
        "proportional": ProportionalConfig,
    },
}
"""Section -> `name` -> its configuration; the first is the default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that defines a run.

    seed: of the run; 0 <= seed < 2**32.
    rounds: T, rounds of the whole run.
    pretrain: how the base is trained where `model.pretrained` is not given.
    plan: how `fedjax-lora plan` chooses; a run ignores it.
    """

    seed: int = 0
    rounds: int = 30
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    clients: ClientsConfig = dataclasses.field(default_factory=ClientsConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    drift: DriftConfig = dataclasses.field(default_factory=NoDriftConfig)
    server: ServerConfig = dataclasses.field(default_factory=FedAvgConfig)
    sparsifier: SparsifierConfig = dataclasses.field(default_factory=SoftConfig)
    aggregation: AggregationConfig = dataclasses.field(default_factory=FedItConfig)
    wire: WireConfig = dataclasses.field(default_factory=WireConfig)
    wireless: WirelessConfig = dataclasses.field(default_factory=WirelessConfig)
    control: ControlConfig = dataclasses.field(default_factory=FixedConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        check(self)
        steps, warmup_steps = self.rounds * self.local.steps, self.local.optimizer.warmup_steps
        if steps >= 2**31:
            raise ValueError(f"rounds * local.steps must be below 2**31, got {self.rounds} * {self.local.steps}")
        if warmup_steps >= steps:
            raise ValueError(
                f"local.optimizer.warmup_steps must be below rounds * local.steps = {steps}, got {warmup_steps}"
            )


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), *, base: ExperimentConfig | None = None
) -> ExperimentConfig:
    """The configuration that a file and overrides describe, over `base` (the defaults if None).

    What is given is laid over what is below it, level by level: the file over `base`, then all overrides over both.
    Another variant's `name` replaces its whole section: what is below was of the old variant. So does a mapping with
    a `name` what earlier overrides have asked of its section.

    Files and folders are named by their absolute paths from here on, so that they are found from any directory.

    Args:
      path: YAML file; None for none.
      overrides: `a.b=value`, where the value is YAML, a mapping too; later ones are laid over earlier ones.
      base: a preset.

    Raises:
      ConfigError: names the key, the value it got and what is allowed.
    """
    over = functools.partial(merge, variants=VARIANTS)
    file = {} if path is None else _spelled_out(read(Path(path)))
    asked: dict[str, Any] = {}
    for override in overrides:
        given = read_override(override)
        asked = over(_without_other_variants(asked, given, override), _spelled_out(given))
    return _with_absolute_paths(_structure(over(over(to_dict(base or ExperimentConfig()), file), asked)))


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain dict of every field, as `dump` writes it."""
    return dataclasses.asdict(config)


def dump(config: ExperimentConfig) -> str:
    """YAML text of every field; loading it gives an equal configuration."""
    return write_value(to_dict(config))


def _with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    def absolute(path: str | None) -> str | None:
        return path if path is None else os.path.abspath(os.path.expanduser(path))

    data = dataclasses.replace(config.data, train=absolute(config.data.train), test=absolute(config.data.test))
    pretrained = config.model.pretrained
    if pretrained is not None and os.path.isdir(os.path.expanduser(pretrained)):  # else a model's id on the hub
        pretrained = absolute(pretrained)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, pretrained=pretrained))


def _without_other_variants(asked: dict[str, Any], given: Mapping[str, Any], override: str) -> dict[str, Any]:
    """What was asked before, but for a section that `override` gives as a whole and by another name."""
    section = override.partition("=")[0].strip()
    whole = given.get(section)
    if section not in VARIANTS or not isinstance(whole, dict) or "name" not in whole:
        return asked
    before = asked.get(section)
    same = isinstance(before, dict) and before.get("name") == whole["name"]
    return asked if same else {key: value for key, value in asked.items() if key != section}


def _spelled_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, in which a word that stands for a section with variants is its name."""
    return {
        key: {"name": value} if key in VARIANTS and isinstance(value, str) else value for key, value in given.items()
    }


# ------------------------------------------------------------------------------------------------ structure


def _structure(raw: dict[str, Any]) -> ExperimentConfig:
    """Dataclasses from nested dicts; the first thing that is wrong is raised as a ConfigError."""
    for section, variants in VARIANTS.items():
        given = raw[section]
        if not isinstance(given, dict):
            raise ConfigError(f"{section} must be a mapping of keys or one of {', '.join(variants)}, got {given!r}")
        if (name := given.get("name")) not in list(variants):
            allowed = ", ".join(variants)
            raise ConfigError(f"{section}.name must be one of {allowed}, got {name!r}{_near(name, variants)}")
    try:
        return _CONVERTER.structure(raw, ExperimentConfig)
    except ClassValidationError as error:
        raise ConfigError(_problem(error, raw, "")) from error


def _section(cls: type, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """How a dataclass is read."""
    fields = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)
    return lambda value, _: fields(_mapping(value), cls)


def _is_variant(kind: Any) -> bool:
    return not dataclasses.is_dataclass(kind) and all(map(dataclasses.is_dataclass, _members(kind)))


def _variant(value: Any, kind: Any) -> Any:
    """The member of a union of dataclasses that `name` chooses."""
    name = _mapping(value)["name"]
    return _CONVERTER.structure(value, next(member for member in _members(kind) if member.name == name))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of keys, got {value!r}")
    return value


def _leaf(value: Any, kind: Any) -> Any:
    """`value` if it is of type `kind`; an integer stands for a float, a list for a tuple."""
    members = _members(kind)
    typed = tuple(value) if isinstance(value, list) else value
    if type(value) is int and float in members and int not in members and abs(value) <= _LARGEST:
        typed = float(value)
    if any(_is(typed, member) for member in members):
        return typed
    options = [option for m in members if typing.get_origin(m) is Literal for option in typing.get_args(m)]
    raise ValueError(f"must be {' or '.join(map(_words, members))}, got {value!r}{_near(value, options)}")


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _is(value: Any, member: Any) -> bool:
    # `type(...) is` and not isinstance: True is an int to Python, and 1 == True in a Literal.
    if typing.get_origin(member) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(member))
    if typing.get_origin(member) is tuple:
        return isinstance(value, tuple) and all(type(item) is typing.get_args(member)[0] for item in value)
    return type(value) is member and not (member is float and not abs(value) <= _LARGEST)


_LARGEST = float(np.finfo(np.float32).max)


def _words(member: Any) -> str:
    """What a type allows, in words."""
    if typing.get_origin(member) is Literal:
        options = [str(option) for option in typing.get_args(member)]
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if typing.get_origin(member) is tuple:
        return {str: "a list of strings", int: "a list of integers"}[typing.get_args(member)[0]]
    return _WORDS[member.__name__]


_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a finite number",  # in float32
    "str": "a string",
    "NoneType": "null",
}

_CONVERTER = cattrs.Converter()
# The last hook whose predicate holds is the one taken.
_CONVERTER.register_structure_hook_func(lambda _: True, _leaf)
_CONVERTER.register_structure_hook_func(_is_variant, _variant)
_CONVERTER.register_structure_hook_factory(dataclasses.is_dataclass, _section)
for _scalar in (bool, int, float, str):  # hooks of single types go before predicates
    _CONVERTER.register_structure_hook(_scalar, _leaf)


# ------------------------------------------------------------------------------------------------ errors


def _problem(error: Exception, raw: Any, path: str) -> str:
    """The first thing that is wrong, as one line with its dotted key."""
    if not isinstance(error, ClassValidationError):
        return f"{path} {error}"
    within, at_class = error.group_exceptions()
    for own in at_class:
        if isinstance(own, ForbiddenExtraKeysError):
            return _unknown_key(own, raw, path)
    for inner, note in within:
        return _problem(inner, raw.get(note.name) if isinstance(raw, dict) else raw, _join(path, note.name))
    # What is left is the class's own check, whose message begins with the field.
    return _join(path, str(at_class[0]))


def _unknown_key(error: ForbiddenExtraKeysError, raw: Mapping[str, Any], path: str) -> str:
    key = min(error.extra_fields, key=str)
    dotted, got = _join(path, key), f"got it with value {raw[key]!r}"
    others = _keys_of_variants(path)
    if key in others:
        return f"{dotted} is a key of {path}.name = {', '.join(others[key])}, not of {raw['name']}; {got}"
    valid = [field.name for field in dataclasses.fields(error.cl)]
    near = [_join(path, name) for name in difflib.get_close_matches(str(key), valid, n=1)] or _elsewhere(key, path)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif other := difflib.get_close_matches(str(key), others, n=1):
        hint = f"did you mean {_join(path, other[0])}, a key of {path}.name = {', '.join(others[other[0]])}?"
    else:
        hint = f"valid keys are {', '.join(valid)}"
    return f"{dotted} is not a known key, {got}; {hint}"


def _keys_of_variants(section: str) -> dict[str, list[str]]:
    """Key -> names of the variants of `section` that have it."""
    keys: dict[str, list[str]] = {}
    for name, kind in VARIANTS.get(section, {}).items():
        for field in dataclasses.fields(kind):
            keys.setdefault(field.name, []).append(name)
    return keys


def _elsewhere(key: Any, path: str) -> list[str]:
    """Dotted keys of other sections that end in `key`; only those below `path` where there are such."""
    found = [name for name in _all_keys(ExperimentConfig()) if name.split(".")[-1] == key]
    found = [name for name in found if name != _join(path, key)]
    return [name for name in found if path and name.startswith(f"{path}.")] or found


def _all_keys(config: Any, path: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), _join(path, field.name)
        keys += _all_keys(value, name) if dataclasses.is_dataclass(value) else [name]
    return keys


def _near(value: Any, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(options), n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _join(path: str, key: Any) -> str:
    word = str(key) if str(key).isprintable() else repr(key)
    return f"{path}.{word}" if path else word
