"""Adapters to start from: a folder that PEFT wrote, or one of our own exports.

Only `adapter_config.json`, `adapter_model.safetensors` and the head beside them are read, never a pickle.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_lora.core.learning import Site
from fedjax_lora.models import peft_config, safetensors
from fedjax_lora.models.family import HeadClass
from fedjax_lora.models.peft_config import PeftConfig

FIELD = "lora.initial"
HEAD, HEAD_FACTS = "head.safetensors", "head.json"
"""What an export holds beside what PEFT reads."""

_SAVED = "base_model.model."
_LORA = re.compile(rf"{re.escape(_SAVED)}(.+)\.lora_(A|B)\.weight")
_HEADS = ("classifier", "score")
"""Modules in which PEFT looks for the head of a task by itself."""


class Wanted(NamedTuple):
    """What adapters must fit.

    sites: `Model.sites`. targets: names of those that carry an adapter. num_layers: L.
    head: leaf -> shape. labels: of its columns. pooling, pooler: what it sees, as in an export.
    head_class: of transformers, which computes what the head does; None where there is none.
    weights_hash: of the base model's layers in float32, as an export has it.
    """

    sites: Mapping[str, Site]
    targets: Sequence[str]
    num_layers: int
    head: Mapping[str, tuple[int, ...]]
    labels: Sequence[str]
    pooling: str
    pooler: bool
    head_class: HeadClass | None
    weights_hash: str


class Initial(NamedTuple):
    """Adapters to start from; NumPy arrays, float32.

    a, b: module name -> `[L, n_in, r]` and `[L, r, n_out]`, zero beyond the rank of a layer; b carries PEFT's scale.
    ranks: module name -> `[L]`, components of each layer.
    head: of the task; `{}` where none fits. lacks: why not, in words; "" where one does.
    base_model: by the name that the folder has for it.
    """

    a: dict[str, np.ndarray]
    b: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    head: dict[str, np.ndarray]
    lacks: str
    base_model: str

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(int(ranks.max()) for ranks in self.ranks.values())


def read(path: str, wanted: Wanted) -> Initial:
    """The adapters of a folder.

    Raises:
      ValueError: it is no folder of LoRA adapters or a damaged one, or it holds what is not computed or does not fit
        the model; one line that names the field, the module or the file.
    """
    folder = Path(path)
    config = peft_config.read(folder, FIELD)
    facts = safetensors.read_json(folder / HEAD_FACTS, FIELD) if (folder / HEAD_FACTS).is_file() else {}
    if facts.get("weights_hash", wanted.weights_hash) != wanted.weights_hash:
        raise ValueError(
            f"{FIELD} must be of the model that model.pretrained names, got adapters of {config.base_model} in {folder}"
        )
    heads = {*_HEADS, *([wanted.head_class.head] if wanted.head_class else [])}
    if odd := sorted(set(config.modules_to_save) - heads):
        raise ValueError(f"{FIELD} must hold no module in full but the task's head, got {odd[0]!r} in {folder}")
    tensors = safetensors.read_all(folder / peft_config.WEIGHTS, FIELD)
    rest = {name: tensor for name, tensor in tensors.items() if not _LORA.fullmatch(name)}
    if odd := sorted(name for name in rest if name.removeprefix(_SAVED).partition(".")[0] not in heads):
        raise ValueError(f"{FIELD} must hold factors of LoRA and the task's head, got {odd[0]!r} in {folder}")
    layers = _layers({name: tensor for name, tensor in tensors.items() if name not in rest}, config, wanted, folder)
    head = _head(folder, rest, facts, wanted)
    lacks = head if isinstance(head, str) else ""
    own = {} if isinstance(head, str) else head
    return Initial(**_stacked(layers, wanted), head=own, lacks=lacks, base_model=config.base_model)


Layers = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]
"""Module -> layer -> `a: [n_in, r]` and `b: [r, n_out]` with PEFT's scale in it."""


def _layers(tensors: Mapping[str, np.ndarray], config: PeftConfig, wanted: Wanted, folder: Path) -> Layers:
    """The factors of an adapter, at the sites of the model; ValueError where they are not those that are wanted."""
    names = {
        site.source.format(layer=layer): (name, layer)
        for name, site in wanted.sites.items()
        if site.source
        for layer in range(wanted.num_layers)
    }
    layers: Layers = {}
    modules = {match[1]: None for name in tensors if (match := _LORA.fullmatch(name))}
    for module in modules:
        own = next((module[i:] for i in _starts(module) if module[i:] in names), None)
        if own is None:
            known = ", ".join(wanted.sites)
            raise ValueError(f"{FIELD} must hold adapters of the model's modules, {known}, got {module} in {folder}")
        name, layer = names[own]
        layers.setdefault(name, {})[layer] = _factors(module, wanted.sites[name], tensors, config, folder)
    if set(layers) != set(wanted.targets):
        found = ", ".join(name for name in wanted.sites if name in layers)
        got = ", ".join(wanted.targets)
        raise ValueError(f"lora.targets must be {found or 'absent'}, the modules of {FIELD}, got {got}: {folder}")
    return layers


def _starts(module: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(match.end() for match in re.finditer(r"\.", module))]


def _factors(
    module: str, site: Site, tensors: Mapping[str, np.ndarray], config: PeftConfig, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    rank = config.rank_of(module)
    wanted = {"A": (rank, site.n_in), "B": (site.n_out, rank)}
    found = {side: tensors.get(f"{_SAVED}{module}.lora_{side}.weight") for side in wanted}
    for side, shape in wanted.items():
        tensor = found[side]
        if tensor is None or tensor.shape != shape:
            got = "none" if tensor is None else tensor.shape
            raise ValueError(f"{FIELD} must hold lora_{side} of {module} of shape {shape}, got {got} in {folder}")
    a, b = np.asarray(found["A"]), np.asarray(found["B"])
    return a.T, np.float32(config.scale_of(module)) * b.T


def _stacked(layers: Layers, wanted: Wanted) -> dict[str, Any]:
    """The fields a, b and ranks of Initial."""
    a, b, ranks = {}, {}, {}
    for name in wanted.targets:
        site, own = wanted.sites[name], layers[name]
        most = max(a.shape[1] for a, _ in own.values())
        a[name] = np.zeros((wanted.num_layers, site.n_in, most), np.float32)
        b[name] = np.zeros((wanted.num_layers, most, site.n_out), np.float32)
        ranks[name] = np.zeros(wanted.num_layers, np.int32)
        for layer, (own_a, own_b) in own.items():
            rank = ranks[name][layer] = own_a.shape[1]
            a[name][layer, :, :rank], b[name][layer, :rank] = own_a, own_b
    return {"a": a, "b": b, "ranks": ranks}


def _head(
    folder: Path, saved: Mapping[str, np.ndarray], facts: Mapping[str, Any], wanted: Wanted
) -> dict[str, np.ndarray] | str:
    """The head that a folder holds, or why it holds none that fits."""
    if not wanted.head:
        return {}
    if saved:
        if wanted.head_class is None:
            return "the class that its head is of computes another task, or sees something else than model.pooling"
        prefix = f"{_SAVED}{wanted.head_class.head}."
        leaves = {"weight": "w", "bias": "b"}
        own = {name.removeprefix(prefix): tensor.T for name, tensor in saved.items()}
        head = {leaves.get(name, name): tensor for name, tensor in own.items()}
    elif (folder / HEAD).is_file():
        if (facts.get("pooling"), facts.get("pooler")) != (wanted.pooling, wanted.pooler):
            return f"its head sees {facts.get('pooling')!r} positions, and model.pooling is {wanted.pooling!r}"
        head = safetensors.read_all(folder / HEAD, FIELD)
    else:
        return "it holds none"
    shapes = {name: leaf.shape for name, leaf in head.items()}
    if shapes != dict(wanted.head):
        return f"its head has leaves of shapes {shapes}, and {dict(wanted.head)} are needed"
    labels = facts.get("id2label")
    if labels and labels != {str(column): label for column, label in enumerate(wanted.labels)}:
        return "its head has other labels than the data, or another order of them"
    return head
