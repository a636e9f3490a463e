"""Adapters as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, the task head and a model card."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from fedjax_lora.adapters.layer_ranks import LayerRanks
from fedjax_lora.core.learning import Site
from fedjax_lora.core.types import Adapters
from fedjax_lora.io import model_card
from fedjax_lora.io.files import atomic_folder, copy_files, write_json
from fedjax_lora.io.model_card import Card

_NEGLIGIBLE = 1e-6
"""Singular values below this share of a matrix's largest are what float32 has left of its sums."""

Layers = Sequence[tuple[np.ndarray, np.ndarray]]
"""Factors of each layer of a module, `a: [n_in, r]` and `b: [r, n_out]`, float32; r may differ from layer to layer."""


class LowRank(NamedTuple):
    """What adapters add to the weights of a model.

    modules: name -> its factors. scale: of each product a @ b, whatever its rank.
    shares: name -> `[L]`, what a layer's scale is more than that; `{}` for nothing.
    """

    modules: Mapping[str, Layers]
    scale: float
    shares: Mapping[str, Sequence[float]] = {}

    def scale_of(self, name: str, layer: int) -> float:
        """Of the product in a layer."""
        return self.scale * float(self.shares[name][layer]) if name in self.shares else self.scale


def plain(adapters: Adapters, rank: int, scale: float, layers: LayerRanks | None = None) -> LowRank:
    """The first `rank` components of adapters, or as many as a layer has."""
    modules = {}
    for name, factors in adapters.modules.items():
        a, b = np.asarray(factors.a), np.asarray(factors.b)
        ranks = np.full(len(a), rank)
        if layers is not None and layers.ranks:
            ranks = np.minimum(ranks, layers.ranks[name]).astype(int)
        modules[name] = [(a[i, :, :own], b[i, :own]) for i, own in enumerate(ranks)]
    return LowRank(modules, scale, {} if layers is None else layers.shares)


def absorb(adapters: LowRank, merged: Mapping[str, np.ndarray]) -> LowRank:
    """What `adapters` and the products merged into the frozen weights do together, each layer in the least rank.

    Args:
      adapters: of any scale.
      merged: module name -> `[L, n_in, n_out]`, added to its frozen weights.

    Returns:
      Factors of scale 1.
    """
    modules = {}
    for name, layers in adapters.modules.items():
        factors = enumerate(zip(layers, np.asarray(merged[name], np.float64), strict=True))
        modules[name] = [
            _factorise(product + adapters.scale_of(name, layer) * a.astype(np.float64) @ b)
            for layer, ((a, b), product) in factors
        ]
    return LowRank(modules, 1.0)


def _factorise(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[n_in, n_out]` as `[n_in, r]` and `[r, n_out]` of its rank r, at least 1."""
    u, values, v = np.linalg.svd(product, full_matrices=False)
    rank = max(1, int(np.sum(values > _NEGLIGIBLE * values[0])))
    root = np.sqrt(values[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)


def export(
    folder: str | Path,
    base: Path,
    adapters: LowRank,
    head: Mapping[str, np.ndarray],
    sites: Mapping[str, Site],
    card: Card,
    fan_in_fan_out: bool = False,
) -> None:
    """Write adapters for `peft.PeftModel.from_pretrained` and PEFT's auto classes.

    Where the card names a class of transformers, the head is among the adapters, as the module that the class has for
    it; else it goes to `head.safetensors`. What a reader asks first goes to `README.md`, and the base model's tokenizer
    goes with it.

    Args:
      folder: new or empty.
      base: folder of the base model.
      adapters: trained ones.
      head: `w: [d, columns]`, and `b` where it has one; `{}` for none.
      sites: of the model, whose `source` names each in the base model.
      card: what else to tell.
      fan_in_fan_out: whether the base model holds these modules as `[n_in, n_out]`.

    Raises:
      ValueError: the folder is in use, or a module has no name in the base model.
    """
    prefix = card.head_class.prefix if card.head_class else ""
    tensors, ranks, alphas = {}, {}, {}
    for name, a, b, scale in _named(adapters, sites):
        # Whole names: PEFT matches endings, and that of `down` is the ending of `output` too.
        ranks[name], alphas[name] = a.shape[1], _alpha(a.shape[1], scale)
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
    if card.head_class:
        tensors |= {f"base_model.model.{name}": leaf for name, leaf in head_tensors(head, card.head_class.head).items()}
    with atomic_folder(folder) as partial:
        copy_files(base, partial, model_card.TOKENIZER)
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        write_json(partial / "adapter_config.json", _config(ranks, alphas, card, fan_in_fan_out))
        model_card.write_head(partial, head, card)
        told = {"rank": max(ranks.values()), "alpha": alphas[max(ranks, key=ranks.__getitem__)]}
        text = model_card.readme("LoRA adapters", "peft", card, told, _usage(card))
        (partial / "README.md").write_text(text, encoding="utf-8")


def head_tensors(head: Mapping[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    """A head as PyTorch's linear layer of this name holds it; nothing of a task without a head."""
    names = {"w": "weight", "b": "bias"}
    return {f"{module}.{names[leaf]}": np.ascontiguousarray(value.T) for leaf, value in head.items()}


def _named(adapters: LowRank, sites: Mapping[str, Site]) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
    """Name in the base model, a, b and scale of each layer of each module."""
    for module, layers in adapters.modules.items():
        if module not in sites or not sites[module].source:
            raise ValueError(f"adapters must be of modules of the base model to export to peft, got {module!r}")
        for layer, (a, b) in enumerate(layers):
            yield sites[module].source.format(layer=layer), a, b, adapters.scale_of(module, layer)


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], card: Card, fan_in_fan_out: bool) -> dict[str, Any]:
    """`adapter_config.json`, whose patterns name the modules that differ from the first one of the largest rank."""
    first, found = max(ranks, key=ranks.__getitem__), card.head_class
    named = bool(found and not found.task_type)  # a class that PEFT has no auto class for
    return {
        "peft_type": "LORA",
        "task_type": None if named else found.task_type if found else "FEATURE_EXTRACTION",
        "auto_mapping": {"base_model_class": found.name, "parent_library": "transformers"} if found and named else None,
        "base_model_name_or_path": card.base_model,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": list(ranks),
        "modules_to_save": [found.head] if found and found.head else None,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _alpha(rank: int, scale: float) -> float:
    """LoRA's alpha of so many components at a scale of alpha / rank."""
    return float(f"{scale * rank:.12g}")  # 16 / 3 * 3 is 16


_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "": "AutoPeftModel",
}
"""PEFT's classes by the type of the task."""


def _usage(card: Card) -> str:
    """How to load the adapters, in the words of the model card."""
    if card.head_class is None:
        loads = "`AutoPeftModelForFeatureExtraction.from_pretrained(FOLDER)` of `peft` loads the base model with the"
        return f"{loads} adapters. {model_card.head_usage(card)}"
    labels = f", num_labels={len(card.labels) or 1}" if card.head_class.head else ""
    loads = f"`{_AUTO_CLASSES[card.head_class.task_type]}.from_pretrained(FOLDER{labels})` of `peft` loads"
    if not labels:
        return f"{loads} the base model with the adapters."
    return (
        f"{loads} the base model with the adapters and the task head; where the base model has a head of its own, "
        "`ignore_mismatched_sizes=True` lets that go. `head.json` names the label of each column."
    )
