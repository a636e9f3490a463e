"""From a model's configuration to the model, its pretrained weights and its tokenizer."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from fedjax_lora.core.errors import reason_of
from fedjax_lora.core.learning import Model
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Base
from fedjax_lora.models import bert, safetensors, vit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["mean", "cls"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Which model to fine-tune.

    name: of a small model that starts from random weights; used where `pretrained` is not given.
    pretrained: a Hugging Face folder or hub id.
    pooling: what the task's head sees: the mean over real positions, or the first position, through the
      checkpoint's pooler where it has one.
    compute_dtype: of the frozen matrices, of what products multiply and of what a backward pass keeps; sums, softmax,
      norms, the adapters themselves and their optimizer are float32.
    dropout: rate after the embeddings and on the output of each residual branch. It is not traced: 0 is another
      program, which draws no masks.
    """

    name: Literal["vit-tiny"] = "vit-tiny"
    pretrained: str | None = None
    pooling: Pooling = "mean"
    compute_dtype: Dtype = "float32"
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained == "":
            raise ValueError("pretrained must be a folder or a Hugging Face model id, got ''")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def breaks(self) -> dict[str, str]:
        """Rounded matrices are no place for a merge that is to be exact."""
        return {} if self.compute_dtype == "float32" else {"float32_base": "compute_dtype"}


def make(options: ModelConfig, context: Context) -> Model:
    """The model: of a checkpoint's shape where one is named, for text, or else a small one for images.

    Args:
      options: which model.
      context: `made["task"]` and `made["adapter"]`; the `image_shape`, None for text.

    Raises:
      ValueError: the model does not fit the data, or the folder cannot be read.
    """
    parts = context.made["task"], context.made["adapter"]
    if options.pretrained is not None:
        if context.image_shape is not None:
            raise ValueError(f"model.pretrained must be absent for images, got {options.pretrained!r}")
        model = bert.bert(_shape(options, safetensors.resolve(options.pretrained)), *parts)
        return model._replace(weights=lambda: read_pretrained(options, str(options.pretrained))[1])
    if context.image_shape is None:
        raise ValueError("model.pretrained must be a folder or a Hugging Face model id for text, got None")
    more = {"pooling": options.pooling, "dropout": options.dropout, "compute_dtype": options.compute_dtype}
    return vit.vit(vit.tiny(context.image_shape, **more), *parts)


METHOD = Method("model", "vit-tiny", ModelConfig, make)


def build_model(
    config: Options, context: Context, make: Callable[[Any, Context], Model] = make
) -> tuple[Model, Base | None]:
    """The model and its pretrained weights.

    Args:
      config: which model.
      context: as for `make`.
      make: of the method that `config` is the options of.

    Returns:
      the model, and its frozen weights or None where nothing pretrained is given (`Model.init` makes some).

    Raises:
      ValueError: the model does not fit the data, or the folder cannot be loaded.
    """
    model = make(config, context)
    return model, None if model.weights is None else model.weights()


def read_pretrained(config: ModelConfig, pretrained: str) -> tuple[bert.BertConfig, Base]:
    """The shape and the frozen weights of a Hugging Face folder or hub id, with our own options of `config`.

    Raises:
      ValueError: the folder cannot be loaded.
    """
    folder = safetensors.resolve(pretrained)
    shape = _shape(config, folder)
    like = jax.eval_shape(lambda: bert.init(shape, jax.random.key(0)))
    return shape, safetensors.load(folder, bert.weight_map(shape), like, bert.PREFIXES, bert.IGNORED, bert.RENAMED)


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


def _shape(config: ModelConfig, folder: Path) -> bert.BertConfig:
    """The encoder of a folder with our own options: it has a pooler where the folder has one and it is asked for."""
    has_pooler = not {prefix + bert.POOLER for prefix in bert.PREFIXES}.isdisjoint(safetensors.tensor_files(folder))
    return _read_shape(
        folder,
        pooling=config.pooling,
        pooler=has_pooler and config.pooling == "cls",
        dropout=config.dropout,
        compute_dtype=config.compute_dtype,
    )


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
