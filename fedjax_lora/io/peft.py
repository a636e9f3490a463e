"""Adapters as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, the task head and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fedjax_lora.core.learning import Site
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.io.files import atomic_folder

_NEGLIGIBLE = 1e-6
"""Singular values below this share of a matrix's largest are what float32 has left of its sums."""


class Card(NamedTuple):
    """What adapters alone do not tell.

    base_model: folder or hub id that they were trained on.
    labels: one for each column of the head.
    pooling: what the head sees, of `ModelConfig`. pooler: whether through the checkpoint's pooler.
    facts: lines of the model card, by what they are of.
    """

    base_model: str
    labels: Sequence[str]
    pooling: str
    pooler: bool
    facts: Mapping[str, Any]


def absorb(adapters: Adapters, merged: Mapping[str, np.ndarray], rank: int, alpha: float) -> tuple[Adapters, int]:
    """Adapters, of scale 1, that compute what `adapters` and the products merged into the frozen weights do together.

    Args:
      adapters: components beyond `rank` are left out.
      merged: module name -> `[L, n_in, n_out]`, added to its frozen weights.
      rank, alpha: structural rank and LoRA's alpha.

    Returns:
      The adapters, float32, and their rank: the least that every layer of every module fits in.
    """
    split = {}
    for name, factors in adapters.modules.items():
        a, b = (np.asarray(factor, np.float64) for factor in (factors.a, factors.b))
        split[name] = _factorise(merged[name] + alpha / rank * a[:, :, :rank] @ b[:, :rank])
    most = max(a.shape[-1] for a, _ in split.values())
    modules = {}
    for name, (a, b) in split.items():
        zeros = (0, most - a.shape[-1])
        a, b = np.pad(a, ((0, 0), (0, 0), zeros)), np.pad(b, ((0, 0), zeros, (0, 0)))
        modules[name] = Factors(a=jnp.asarray(a), b=jnp.asarray(b))
    return Adapters(modules=modules, head=adapters.head), most


def _factorise(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[L, n_in, n_out]` as `[L, n_in, r]` and `[L, r, n_out]` of the largest rank r of its layers, at least 1."""
    u, values, v = np.linalg.svd(product, full_matrices=False)
    rank = max(1, int(np.sum(values > _NEGLIGIBLE * values[:, :1], axis=-1).max()))
    root = np.sqrt(values[:, :rank])
    a, b = u[:, :, :rank] * root[:, None], root[:, :, None] * v[:, :rank]
    return a.astype(np.float32), b.astype(np.float32)


def export(
    folder: str | Path, adapters: Adapters, sites: Mapping[str, Site], rank: int, alpha: float, card: Card
) -> None:
    """Write adapters for `peft.PeftModel.from_pretrained` and `peft.AutoPeftModelForFeatureExtraction`.

    The task head goes to `head.safetensors`, its labels to `head.json`, and what a reader asks first to `README.md`.

    Args:
      folder: new or empty.
      adapters: trained ones; components beyond `rank` are left out.
      sites: of the model, whose `source` names each in the base model.
      rank, alpha: structural rank and LoRA's alpha.
      card: what else to tell.

    Raises:
      ValueError: the folder is in use, or a module has no name in the base model.
    """
    tensors, targets = {}, []
    for module, factors in adapters.modules.items():
        if module not in sites or not sites[module].source:
            raise ValueError(f"adapters must be of modules of the base model to export to peft, got {module!r}")
        a, b = np.asarray(factors.a)[:, :, :rank], np.asarray(factors.b)[:, :rank]
        for layer in range(a.shape[0]):
            # Whole names: PEFT matches endings, and that of `down` is the ending of `output` too.
            targets.append(sites[module].source.format(layer=layer))
            prefix = f"base_model.model.{targets[-1]}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[layer].T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[layer].T)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": card.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    head = {name: np.asarray(leaf) for name, leaf in adapters.head.items()}
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / "adapter_model.safetensors")
        save_file(head, partial / "head.safetensors")
        _write_json(partial / "adapter_config.json", config)
        _write_json(partial / "head.json", _head(head, card))
        (partial / "README.md").write_text(_readme(rank, alpha, card), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _head(head: Mapping[str, np.ndarray], card: Card) -> dict[str, Any]:
    """What is needed to use the head; labels as a `config.json` of transformers names them."""
    return {
        "id2label": {str(column): label for column, label in enumerate(card.labels)},
        "label2id": {label: column for column, label in enumerate(card.labels)},
        "pooling": card.pooling,
        "pooler": card.pooler,
        "shapes": {name: leaf.shape for name, leaf in head.items()},
    }


def _readme(rank: int, alpha: float, card: Card) -> str:
    pooled = {"mean": "mean over real positions", "cls": "first position"}[card.pooling]
    labels = {str(column): label for column, label in enumerate(card.labels)}
    told = {"base model": card.base_model, "rank": rank, "alpha": alpha, "labels": labels, **card.facts}
    lines = "\n".join(f"- {what}: {json.dumps(value, ensure_ascii=False)}" for what, value in told.items())
    on_the_hub = "" if Path(card.base_model).is_absolute() else f"base_model: {card.base_model}\n"
    return f"""---
library_name: peft
{on_the_hub}---
# LoRA adapters

{lines}

`AutoPeftModelForFeatureExtraction.from_pretrained(FOLDER)` of `peft` loads the base model with the adapters. The task
head is in `head.safetensors`: logits are `pooled @ w + b`, where `pooled` is the {pooled} of the last hidden
state{", through the base model's pooler" if card.pooler else ""}; `head.json` names the label of each column.
"""
