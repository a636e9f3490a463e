"""From a model's configuration to the model, its pretrained weights and its tokenizer."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fedjax_lora.core.errors import reason_of
from fedjax_lora.core.learning import Learned, Model
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Base
from fedjax_lora.models import families, layers, safetensors, table, vit
from fedjax_lora.models.families import FAMILIES
from fedjax_lora.models.family import Dtype, Family, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Which model to fine-tune.

    name: of a small model that starts from random weights; used where `pretrained` is not given.
    pretrained: a Hugging Face folder or hub id.
    pooling: what the task's head sees: the `mean` over real positions; the first position (`cls`), through the
      checkpoint's pooler where it has one; or the `last` one, whose head then has no bias.
    compute_dtype: of the frozen matrices, of what products multiply and of what a backward pass keeps; sums, softmax,
      norms, the adapters themselves and their optimizer are float32.
    activation_dtype: of what passes from one operation of a layer to the next; bfloat16, where the products multiply
      in it too, halves the traffic that decides about a GPU's speed. Sums, softmax and norms are float32 inside.
    dropout: rate after the embeddings and on the output of each residual branch. It is not traced: 0 is another
      program, which draws no masks.
    remat: whether the backward pass computes each layer again and keeps its input alone: less memory, a third more
      time.
    unroll: whether the layers are compiled one after another, not as a loop: what the backward pass needs of them is
      then not copied into stacks, and compiling takes time and memory by their number.
    """

    name: Literal["vit-tiny"] = "vit-tiny"
    pretrained: str | None = None
    pooling: layers.Pooling = "mean"
    compute_dtype: Dtype = "float32"
    activation_dtype: Dtype = "float32"
    dropout: float = 0.0
    remat: bool = False
    unroll: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained == "":
            raise ValueError("pretrained must be a folder or a Hugging Face model id, got ''")
        if self.activation_dtype != "float32" and self.compute_dtype == "float32":
            raise ValueError(
                f"activation_dtype must be float32 where compute_dtype is float32, got {self.activation_dtype!r}"
            )
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
        found = read_pretrained(options, options.pretrained, parts[0].learns)
        check_inputs(found.shape, options.pretrained, context.image_shape)
        return found.family.make(found.shape, *parts)._replace(weights=found.weights)
    if context.image_shape is None:
        raise ValueError("model.pretrained must be a folder or a Hugging Face model id for text, got None")
    return vit.vit(vit.tiny(context.image_shape, **_ours(options)), *parts)


def _ours(options: ModelConfig) -> dict[str, Any]:
    """What is asked of a model's computation, whatever its shape."""
    return {name: getattr(options, name) for name in _OURS}


def check_inputs(shape: Any, pretrained: str, given: tuple[int, int, int] | None) -> None:
    """Raise ValueError for a model of text where there are images or the other way round, or of other images.

    given: shape of the images; None for text.
    """
    takes = shape.image_shape
    if (takes is None) != (given is None):
        reads, are = ("text", "images") if takes is None else ("images", "text")
        raise ValueError(
            f"model.pretrained must be a model of {are} here, since the data are {are}, got one of {reads}: "
            f"{pretrained!r}"
        )
    if takes != given:
        raise ValueError(
            f"model.pretrained must read images of {given}, height, width and channels of the data, got {takes} in "
            f"config.json of {pretrained!r}"
        )


_OURS = ("pooling", "dropout", "compute_dtype", "activation_dtype", "remat", "unroll")
"""Options that decide about a model's computation, whatever its shape."""

_TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
"""Files of which a tokenizer is read: those of one line."""

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


class Pretrained(NamedTuple):
    """A Hugging Face model.

    folder: on this machine. family, shape: of the model, with our own options. weights: reads its frozen weights.
    spare: reads the tensors that the model does not need, see `safetensors.spare`.
    """

    folder: Path
    family: Family
    shape: Shape
    weights: Callable[[], Base]
    spare: Callable[[], dict[str, np.ndarray]]


def read_pretrained(config: ModelConfig, pretrained: str, learns: Learned = "label") -> Pretrained:
    """A Hugging Face folder or hub id, with our own options of `config`; its weights are not read yet.

    What gives the logits alone is left out, but for a task that learns the next token.

    Raises:
      ValueError: the folder cannot be loaded.
    """
    folder = safetensors.resolve(pretrained)
    family = _family(folder)
    prefixed = {name: {prefix + tensor for prefix in family.prefixes} for name, tensor in family.held.items()}
    files = safetensors.tensor_files(folder)
    unused = () if learns == "next_token" else family.logits
    held = {name: name not in unused and not tensors.isdisjoint(files) for name, tensors in prefixed.items()}
    shape = _shape(family, folder, **_ours(config), **held)
    rows = family.weights(shape)
    like = table.shapes(rows, shape.num_layers, shape.compute_dtype)

    of = folder, rows, like, family.prefixes, family.ignored, family.renamed
    return Pretrained(folder, family, shape, lambda: safetensors.load(*of), lambda: safetensors.spare(*of))


def read_shape(pretrained: str) -> Any:
    """The shape of the model that a Hugging Face folder or hub id holds, as its `config.json` has it.

    Raises:
      ValueError: there is none, or it is of a model that no family computes.
    """
    folder = safetensors.resolve(pretrained)
    return _shape(_family(folder), folder)


def model_config_hash(config: ModelConfig) -> str:
    """SHA-256 of what `config.json` says of the computation, whatever else is in it; empty without a pretrained model.

    Raises:
      ValueError: as `read_shape`.
    """
    if config.pretrained is None:
        return ""
    shape = dataclasses.asdict(read_shape(config.pretrained))
    for name in _OURS:
        del shape[name]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def check_ids(shape: Any, *input_ids: np.ndarray) -> None:
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
    _shape(_family(folder), folder)  # transformers would take what is wrong with it for a fault of the tokenizer
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        # transformers would make an empty tokenizer and say nothing
        allowed = " or ".join(" with ".join(names) for names in _TOKENIZERS)
        raise ValueError(f"model.pretrained must hold {allowed}, got {folder} without")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    except Exception as error:  # it raises errors of several libraries
        reason = reason_of(error)
        raise ValueError(f"model.pretrained must hold a readable tokenizer, got {folder} ({reason})") from None


def _family(folder: Path) -> Family:
    """The family that a folder's `config.json` is of.

    Raises:
      ValueError: the file cannot be read, or is of no family that is known.
    """
    fields = safetensors.read_json(folder / "config.json")
    architectures = fields.get("architectures")
    model_type = fields.get("model_type") or families.model_type(architectures)
    if any(str(name).startswith("AutoModel") for name in fields.get("auto_map") or ()):
        raise ValueError(
            f"model.pretrained must be a model without code of its own (trust_remote_code), got auto_map in {folder}"
        )
    if fields.get("quantization_config"):
        raise ValueError(
            "model.pretrained must have weights that are not quantized, got a quantization_config in config.json of "
            f"{folder}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known, of = ", ".join(FAMILIES), f" and architectures {architectures!r}" if model_type is None else ""
        raise ValueError(
            f"model.pretrained must have a model_type among {known} in config.json, got {model_type!r}{of} in {folder}"
        )
    if not families.agrees(model_type, architectures):
        raise ValueError(
            f"model.pretrained must have architectures of its model_type {model_type!r} in config.json, got "
            f"{architectures!r} in {folder}"
        )
    return FAMILIES[model_type]


def _shape(family: Family, folder: Path, **ours: Any) -> Any:
    """The shape that a folder's `config.json` describes, with our own options.

    Raises:
      ValueError: it describes what the family does not compute.
    """
    try:
        return family.shape(_fields(folder), **ours)
    except ValueError as error:
        raise ValueError(
            f"model.pretrained must hold a config.json of {family.title}, got {folder} where {error}"
        ) from None


def _fields(folder: Path) -> dict[str, Any]:
    """What a folder's `config.json` says, and of what an image passes through before, if it says so."""
    fields, images = safetensors.read_json(folder / "config.json"), folder / "preprocessor_config.json"
    return {"do_normalize": True, **safetensors.read_json(images), **fields} if images.is_file() else fields
