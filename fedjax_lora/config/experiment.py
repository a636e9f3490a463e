"""The configuration of an experiment: one frozen dataclass, composed of each module's own, and its YAML form.

A file names only what differs from the defaults. Reading is strict: every key must exist and every value must be
of its field's type, with two liberties: an integer stands for a float, and the name of a method for its section, as
in `sparsifier: dense`. Scalars are those of YAML 1.2. Whatever is wrong ends in one `ConfigError` of one line.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.config.catalogue import METHODS, SLOTS, Catalogue, check
from fedjax_lora.config.structure import structure
from fedjax_lora.config.values import key_of
from fedjax_lora.config.yaml import merge, read, read_override, write_value
from fedjax_lora.core.errors import ConfigError as ConfigError
from fedjax_lora.core.errors import ConfigWarning as ConfigWarning
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.data.known import find
from fedjax_lora.data.partition import ClientsConfig
from fedjax_lora.models.load import ModelConfig
from fedjax_lora.planning.rank_search import PlanConfig
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sparsifiers.transforms import WireConfig
from fedjax_lora.training.local import LocalConfig
from fedjax_lora.training.pretrain import PretrainConfig

_DEFAULT = {method.slot: method.options for method in reversed(METHODS)}
"""Slot -> options of its default method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that defines a run.

    Sections that are slots of the catalogue hold the options of the method that they name; `load_config` and `build`
    check that these go together, since a user's methods are known to them alone.

    seed: of the run; 0 <= seed < 2**32.
    rounds: T, rounds of the whole run.
    pretrain: how the base is trained where `model.pretrained` is not given.
    plan: how `fedjax-lora plan` chooses; a run ignores it.
    """

    seed: int = 0
    rounds: int = 30
    model: Options = dataclasses.field(default_factory=_DEFAULT["model"])
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    adapter: Options = dataclasses.field(default_factory=_DEFAULT["adapter"])
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    task: Options = dataclasses.field(default_factory=_DEFAULT["task"])
    data: Any = dataclasses.field(default_factory=_DEFAULT["data"])
    clients: ClientsConfig = dataclasses.field(default_factory=ClientsConfig)
    training: Options = dataclasses.field(default_factory=_DEFAULT["training"])
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    drift: Options = dataclasses.field(default_factory=_DEFAULT["drift"])
    server: Options = dataclasses.field(default_factory=_DEFAULT["server"])
    sparsifier: Options = dataclasses.field(default_factory=_DEFAULT["sparsifier"])
    aggregation: Options = dataclasses.field(default_factory=_DEFAULT["aggregation"])
    wire: WireConfig = dataclasses.field(default_factory=WireConfig)
    wireless: Options = dataclasses.field(default_factory=_DEFAULT["wireless"])
    control: Options = dataclasses.field(default_factory=_DEFAULT["control"])
    arrival: Options = dataclasses.field(default_factory=_DEFAULT["arrival"])
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        candidates, most = self.plan.candidates, self.lora.max_rank
        if max(candidates, default=1) > most:
            raise ValueError(f"plan.candidates must be at most lora.max_rank = {most}, got {candidates}")
        pretrained = isinstance(self.model, ModelConfig) and self.model.pretrained is not None
        if self.lora.initial is not None and not pretrained:
            raise ValueError(f"lora.initial must be absent without model.pretrained, got {self.lora.initial!r}")
        steps, warmup_steps = self.rounds * self.local.steps, self.local.optimizer.warmup_steps
        if steps >= 2**31:
            raise ValueError(f"rounds * local.steps must be below 2**31, got {self.rounds} * {self.local.steps}")
        if warmup_steps >= steps:
            raise ValueError(
                f"local.optimizer.warmup_steps must be below rounds * local.steps = {steps}, got {warmup_steps}"
            )


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    base: ExperimentConfig | None = None,
    methods: Iterable[Method] = (),
) -> ExperimentConfig:
    """The configuration that a file and overrides describe, over `base` (the defaults if None).

    What is given is laid over what is below it, level by level: the file over `base`, then all overrides over both.
    Another method's `name` replaces its whole section: what is below was of the old method. So does a mapping with
    a `name` what earlier overrides have asked of its section. The `data` section goes by its `source`.

    Files and folders are named by their absolute paths from here on, so that they are found from any directory.

    Args:
      path: YAML file; None for none.
      overrides: `a.b=value`, where the value is YAML, a mapping too; later ones are laid over earlier ones.
      base: a preset.
      methods: that may be chosen beside the package's own and those of entry points.

    Raises:
      ConfigError: names the key, the value it got and what is allowed.
    """
    catalogue = Catalogue.of(methods)
    over = functools.partial(merge, variants=_KEYS)
    file = {} if path is None else _spelled_out(read(Path(path)))
    asked: dict[str, Any] = {}
    for override in overrides:
        given = read_override(override)
        asked = over(_without_other_methods(asked, given, override), _spelled_out(given))
    raw = over(over(to_dict(base or ExperimentConfig()), file), asked)
    config = _with_absolute_paths(structure(raw, ExperimentConfig, catalogue))
    check(config, catalogue)
    return config


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain dict of every field, as `dump` writes it."""
    return dataclasses.asdict(config)


def dump(config: ExperimentConfig) -> str:
    """YAML text of every field; loading it gives an equal configuration."""
    return write_value(to_dict(config))


_KEYS = {slot: key_of(slot) for slot in SLOTS}
_PATHS = {"data": ("train", "test", "dataset"), "model": ("pretrained",), "lora": ("initial",)}
"""Section -> options that may name a file or a folder."""

_IDS = ("dataset", "pretrained")
"""Those of them that may be an id of the Hugging Face hub too: what is no folder is one, and so is a known name."""


def _with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    changed = {}
    for section, names in _PATHS.items():
        options = getattr(config, section)
        given = {name: path for name in names if isinstance(path := getattr(options, name, None), str)}
        given = {name: path for name, path in given.items() if name != "dataset" or find(path) is None}
        expanded = {name: os.path.expanduser(path) for name, path in given.items()}
        kept = {name: path for name, path in expanded.items() if name not in _IDS or os.path.isdir(path)}
        if kept:
            absolute = {name: os.path.abspath(path) for name, path in kept.items()}
            changed[section] = dataclasses.replace(options, **absolute)
    return dataclasses.replace(config, **changed)


def _without_other_methods(asked: dict[str, Any], given: Mapping[str, Any], override: str) -> dict[str, Any]:
    """What was asked before, but for a section that `override` gives as a whole and by another name."""
    section = override.partition("=")[0].strip()
    whole, key = given.get(section), _KEYS.get(section)
    if not isinstance(whole, dict) or key not in whole:
        return asked
    before = asked.get(section)
    same = isinstance(before, dict) and before.get(key) == whole[key]
    return asked if same else {name: value for name, value in asked.items() if name != section}


def _spelled_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, in which a word that stands for a section with methods is the name of one."""
    return {
        key: {_KEYS[key]: value} if key in _KEYS and isinstance(value, str) else value for key, value in given.items()
    }
