"""From a model's configuration to the model, its pretrained weights and its tokenizer."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

from fedjax_lora.core.errors import reason_of
from fedjax_lora.core.methods import Model
from fedjax_lora.core.types import Base
from fedjax_lora.models import bert, safetensors, vit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["mean", "cls"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to fine-tune.

    name: of a small model that starts from random weights; used where `pretrained` is not given.
    pretrained: a Hugging Face folder or hub id.
    pooling: what the classifier sees: the mean over real positions, or the first position, through the
      checkpoint's pooler where it has one.
    compute_dtype: of the frozen matrices, of what products multiply and of what a backward pass keeps; sums, softmax,
      norms, the adapters themselves and their optimizer are float32.
    dropout: rate after the embeddings and on the output of each residual branch.
    """

    name: Literal["vit-tiny"] = "vit-tiny"
    pretrained: str | None = None
    pooling: Pooling = "mean"
    compute_dtype: Dtype = "float32"
    dropout: float = 0.0

    def __post_init__(self):
        choices = {"name": ("vit-tiny",), "pooling": get_args(Pooling), "compute_dtype": get_args(Dtype)}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if self.pretrained == "":
            raise ValueError("pretrained must be a folder or a Hugging Face model id, got ''")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def build_model(
    config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int] | None = None
) -> tuple[Model, Base | None]:
    """The model and its pretrained weights.

    Args:
      config: which model.
      num_classes: of the task.
      image_shape: `(height, width, channels)` of an image task; None for text.

    Returns:
      the model, and its frozen weights or None where nothing pretrained is given (`Model.init` makes some).

    Raises:
      ValueError: where the model does not fit the data, or the folder cannot be loaded.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if config.pretrained is not None:
        if image_shape is not None:
            raise ValueError(f"model.pretrained must be absent for images, got {config.pretrained!r}")
        return _pretrained_bert(config, config.pretrained, num_classes)
    if image_shape is None:
        raise ValueError("model.pretrained must be a folder or a Hugging Face model id for text, got None")
    options = {"pooling": config.pooling, "dropout": config.dropout, "compute_dtype": config.compute_dtype}
    return vit.vit(vit.tiny(image_shape, **options), num_classes), None


def read_shape(pretrained: str) -> bert.BertConfig:
    """The shape of the encoder that a Hugging Face folder or hub id holds, as its `config.json` has it.

    Raises:
      ValueError: there is none, or it is of another model than this encoder.
    """
    return _read_shape(safetensors.resolve(pretrained))


def model_config_hash(config: ModelConfig) -> str:
    """SHA-256 of what `config.json` says of the computation, whatever else is in it; empty without a pretrained model.

    Raises:
      ValueError: as `read_shape`.
    """
    if config.pretrained is None:
        return ""
    shape = dataclasses.asdict(read_shape(config.pretrained))
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def check_ids(shape: bert.BertConfig, *input_ids: np.ndarray) -> None:
    """Raise ValueError where a token id, of `[N, S]` each, is beyond the model's table of words."""
    largest = max(int(ids.max()) for ids in input_ids)
    if largest >= shape.vocab_size:
        raise ValueError(
            "model.pretrained must have a row for every token of its tokenizer, got the largest token id "
            f"{largest} where vocab_size in config.json is {shape.vocab_size}"
        )


def load_tokenizer(pretrained: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder or hub id; code that comes with a model is never run.

    Raises:
      ValueError: where there is none.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing: nothing needs it
    from transformers import AutoTokenizer  # slow to import: not before it is needed

    folder = safetensors.resolve(pretrained)
    _read_shape(folder)  # transformers would take what is wrong with it for a fault of the tokenizer
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would make an empty tokenizer and say nothing
        raise ValueError(f"model.pretrained must hold tokenizer.json or vocab.txt, got {folder} without either")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    except Exception as error:  # it raises errors of several libraries
        reason = reason_of(error)
        raise ValueError(f"model.pretrained must hold a readable tokenizer, got {folder} ({reason})") from None


def _pretrained_bert(config: ModelConfig, pretrained: str, num_classes: int) -> tuple[Model, Base]:
    folder = safetensors.resolve(pretrained)
    has_pooler = not {prefix + bert.POOLER for prefix in bert.PREFIXES}.isdisjoint(safetensors.tensor_files(folder))
    shape = _read_shape(
        folder,
        pooling=config.pooling,
        pooler=has_pooler and config.pooling == "cls",
        dropout=config.dropout,
        compute_dtype=config.compute_dtype,
    )
    model = bert.bert(shape, num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    base = safetensors.load(folder, bert.weight_map(shape), shapes, bert.PREFIXES, bert.IGNORED, bert.RENAMED)
    return model, base


def _read_shape(folder: Path, **ours: Any) -> bert.BertConfig:
    """The encoder that a folder's `config.json` describes, with our own options.

    Raises:
      ValueError: the file cannot be read, or describes another model than this encoder.
    """
    fields = safetensors.read_json(folder / "config.json")
    if (model_type := fields.get("model_type")) != "bert":
        raise ValueError(f"model.pretrained must have model_type bert in config.json, got {model_type!r}")
    try:
        return bert.read_config(fields, **ours)
    except ValueError as error:
        raise ValueError(f"model.pretrained must hold a config.json of BERT, got {folder} where {error}") from None
