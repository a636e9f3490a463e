"""What an exported folder tells beside its tensors: the task head, its labels, and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from fedjax_lora.io.files import write_json
from fedjax_lora.models.family import HeadClass
from fedjax_lora.models.initial import HEAD, HEAD_FACTS

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files of a base model of text that say how texts become tokens."""


class Card(NamedTuple):
    """What tensors alone do not tell.

    base_model: folder or hub id that the adapters were trained on. weights_hash: of its layers, in float32.
    labels: one for each column of the head; () where columns have none.
    pooling: what the head sees, of `ModelConfig`. pooler: whether through the checkpoint's pooler.
    head_class: of transformers, which computes what the head does; None where there is none.
    facts: lines of the model card, by what they are of.
    """

    base_model: str
    weights_hash: str
    labels: Sequence[str]
    pooling: str
    pooler: bool
    head_class: HeadClass | None
    facts: Mapping[str, Any]


def id2label(labels: Sequence[str]) -> dict[str, str]:
    """The labels as a `config.json` of transformers names them."""
    return {str(column): label for column, label in enumerate(labels)}


def label2id(labels: Sequence[str]) -> dict[str, int]:
    """The columns of labels, as a `config.json` of transformers has them."""
    return {label: column for column, label in enumerate(labels)}


def write_head(folder: Path, head: Mapping[str, np.ndarray], card: Card) -> None:
    """Write what is needed to use the head; the head itself too, where no class of transformers has it."""
    facts = {
        "id2label": id2label(card.labels),
        "label2id": label2id(card.labels),
        "pooling": card.pooling,
        "pooler": card.pooler,
        "weights_hash": card.weights_hash,
        "shapes": {name: leaf.shape for name, leaf in head.items()},
    }
    write_json(folder / HEAD_FACTS, facts)
    if head and card.head_class is None:
        save_file(dict(head), folder / HEAD)


def head_usage(card: Card) -> str:
    """How to use a head that lies beside the model."""
    pooled = {"mean": "mean over real positions", "cls": "first position", "last": "last position"}[card.pooling]
    through = ", through the base model's pooler" if card.pooler else ""
    return (
        f"The task head is in `{HEAD}`: outputs are `pooled @ w + b`, without b where it has none, and `pooled` is the "
        f"{pooled} of the last hidden state{through}; `{HEAD_FACTS}` names the label of each column."
    )


def readme(title: str, library: str, card: Card, told: Mapping[str, Any], usage: str) -> str:
    """The text of a model card, with the front matter of the Hugging Face hub."""
    told = {"base model": card.base_model, **told, "labels": id2label(card.labels), **card.facts}
    lines = "\n".join(f"- {what}: {json.dumps(value, ensure_ascii=False)}" for what, value in told.items())
    on_the_hub = "" if Path(card.base_model).is_absolute() else f"base_model: {card.base_model}\n"
    return f"""---
library_name: {library}
{on_the_hub}---
# {title}

{lines}

{usage}
"""
