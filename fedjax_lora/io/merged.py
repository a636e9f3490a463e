"""A whole model as a Hugging Face folder: a base model's `config.json` and tokenizer, with weights of our own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from fedjax_lora.io import model_card
from fedjax_lora.io.files import atomic_folder, copy_files, write_json
from fedjax_lora.io.model_card import TOKENIZER, Card, id2label, label2id
from fedjax_lora.io.peft import head_tensors
from fedjax_lora.models import families
from fedjax_lora.models.family import HeadClass

_COPIED = (*TOKENIZER, "generation_config.json", "preprocessor_config.json")
"""Files of a base model that go with any weights of its shape."""

_SHARD_BYTES = 5_000_000_000


def export(
    folder: str | Path, base: Path, tensors: Mapping[str, np.ndarray], head: Mapping[str, np.ndarray], card: Card
) -> None:
    """Write a model for `from_pretrained` of transformers.

    Where the card names a class of transformers, the head is among its weights; else it goes to `head.safetensors`.

    Args:
      folder: new or empty.
      base: folder of the base model.
      tensors: weights, float32, by their names in the class that the card names, or in the bare model.
      head: `w: [d, columns]`, and `b` where it has one; `{}` for none.
      card: what else to tell.

    Raises:
      ValueError: the folder is in use.
    """
    found = card.head_class
    if found:
        tensors = {**tensors, **head_tensors(head, found.head)}
    fields = json.loads((base / "config.json").read_text(encoding="utf-8"))
    with atomic_folder(folder) as partial:
        copy_files(base, partial, _COPIED)
        write_json(partial / "config.json", _config(fields, head, card))
        _save(partial, tensors)
        model_card.write_head(partial, head, card)
        text = model_card.readme("Fine-tuned model", "transformers", card, {}, _usage(card))
        (partial / "README.md").write_text(text, encoding="utf-8")


def _config(fields: Mapping[str, Any], head: Mapping[str, np.ndarray], card: Card) -> dict[str, Any]:
    """The base model's `config.json` with the task's labels, and with the class that computes it."""
    dropped = ("architectures", "transformers_weights", "torch_dtype", "problem_type")
    config = {name: value for name, value in fields.items() if name not in dropped} | {"dtype": "float32"}
    found = card.head_class
    if not config.get("model_type"):
        config["model_type"] = families.model_type(fields.get("architectures"))
    if head:  # by which transformers counts the columns, also of one that has no label
        labels = card.labels or [f"LABEL_{column}" for column in range(head["w"].shape[-1])]
        config |= {"id2label": id2label(labels), "label2id": label2id(labels)}
    if found:
        config |= {"architectures": [found.name]} | ({"problem_type": found.problem_type} if found.problem_type else {})
    if found and _padded_at_the_end(found, card) and config.get("pad_token_id") is None:
        config["pad_token_id"] = config.get("eos_token_id")
    return config


def _padded_at_the_end(found: HeadClass, card: Card) -> bool:
    """Whether a class looks for the last position that is no padding."""
    return found.task_type == "SEQ_CLS" and card.pooling == "last"


def _save(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """`model.safetensors`, or shards with their index."""
    pattern = "model{suffix}.safetensors"
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda x: x.nbytes, filename_pattern=pattern, max_shard_size=_SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _usage(card: Card) -> str:
    if card.head_class is None:
        return f"`AutoModel.from_pretrained(FOLDER)` of `transformers` loads the model. {model_card.head_usage(card)}"
    return f"`{card.head_class.name}.from_pretrained(FOLDER)` of `transformers` loads the model."
