"""The `adapter_config.json` of PEFT, where it is of what is computed here: LoRA, by patterns or with `use_rslora`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_lora.adapters.patterns import is_expression, matching_key
from fedjax_lora.models.safetensors import read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_READ = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "modules_to_save",
}
_WITHOUT_EFFECT = {
    "alora_invocation_tokens",
    "auto_mapping",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
"""On what the tensors of an adapter, which name their modules, compute."""
_ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
"""Other starts change the base model's weights."""


class PeftConfig(NamedTuple):
    """What the tensors of an adapter do not tell.

    base_model: by the name that PEFT has for it; "" for none.
    rank, alpha: of LoRA, where no pattern says otherwise. rank_pattern, alpha_pattern: expression for names -> its own.
    rslora: whether products are scaled by alpha / sqrt(r). modules_to_save: trained in full.
    """

    base_model: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    modules_to_save: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """r of a module by its name in the base model."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """By what the product of a module's factors is scaled."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read(folder: Path, field: str) -> PeftConfig:
    """The configuration of an adapter; `field` names the folder in messages.

    Raises:
      ValueError: there is none, or it asks for what is not computed, by the name of its field.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{field} must be a folder of PEFT, got {folder} without {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        pickled = f", {PICKLE}, which is a pickle and never read" if (folder / PICKLE).exists() else ""
        raise ValueError(f"{field} must hold {WEIGHTS}, got {folder} without{pickled}")
    fields = read_json(folder / CONFIG, field)
    problem = _problem(fields)
    if problem:
        raise ValueError(f"{field} must hold an {CONFIG} of plain LoRA, got {folder} where {problem}")
    return PeftConfig(
        base_model=fields.get("base_model_name_or_path") or "",
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        rslora=fields.get("use_rslora", False),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )


def _problem(fields: Mapping[str, Any]) -> str | None:
    """What of a configuration is not computed, or is not of its type; None for nothing."""
    if fields.get("peft_type") != "LORA":
        return f"peft_type must be LORA, got {fields.get('peft_type')!r}"
    for name, value in fields.items():
        if name in _ALLOWED and value is not None and value not in _ALLOWED[name]:
            return f"{name} must be {' or '.join(map(repr, _ALLOWED[name]))}, got {value!r}"
        if name not in _READ | _WITHOUT_EFFECT | _ALLOWED.keys() and value:
            return f"{name} must be absent, got {value!r}"
    numbers: dict[str, Any] = {"r": fields.get("r"), "lora_alpha": fields.get("lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = fields.get(pattern) or {}
        if not isinstance(given, dict):
            return f"{pattern} must map names to numbers, got {given!r}"
        numbers |= {f"{pattern} of {name}": value for name, value in given.items()}
        if bad := next((name for name in given if not is_expression(name)), None):
            return f"{pattern} must have expressions as its keys, got {bad!r}"
    for name, value in numbers.items():
        kinds = (int,) if name == "r" or name.startswith("rank") else (int, float)
        if type(value) not in kinds or not 0 < value < 2**31:
            return f"{name} must be a positive {'integer' if kinds == (int,) else 'number'}, got {value!r}"
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        return f"modules_to_save must be a list of names, got {saved!r}"
    for name, kind, words in (("base_model_name_or_path", str, "a name"), ("use_rslora", bool, "true or false")):
        if (value := fields.get(name)) is not None and type(value) is not kind:
            return f"{name} must be {words}, got {value!r}"
    return None


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value that a pattern has for a name."""
    key = matching_key(pattern, module)
    return default if key is None else pattern[key]
