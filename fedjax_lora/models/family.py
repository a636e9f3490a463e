"""What families of models share: the shape that a `config.json` describes, and what the loader knows of a family."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from fedjax_lora.core.learning import Adapter, Model, Task
from fedjax_lora.models import layers
from fedjax_lora.models.table import Table

Dtype = Literal["float32", "bfloat16"]

_MOST, _MOST_LAYERS = 2**24, 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a model, and what is asked of its computation.

    pooling: what a head sees of an example, see `layers.pool`.
    dropout: rate after the embeddings and on the output of each residual branch.
    compute_dtype: of the frozen matrices and their products.
    activation_dtype: of what passes from one operation of a layer to the next.
    remat: whether the backward pass computes each layer again, and keeps its input alone.
    unroll: whether the layers are compiled one after another, not as a loop.
    """

    num_layers: int = 12
    num_heads: int = 12
    pooling: layers.Pooling = "mean"
    dropout: float = 0.0
    compute_dtype: Dtype = "float32"
    activation_dtype: Dtype = "float32"
    remat: bool = False
    unroll: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the images that the model reads; None for a model of text."""
        return None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), _MOST_LAYERS if field.name == "num_layers" else _MOST
            counts = field.type is int or (field.type == int | None and value is not None)
            if counts and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{field.name} must be an integer from 1 to {most}, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be true or false, got {value!r}")
        for name in ("activation", "norm_eps"):
            if hasattr(self, name):
                _CHECKS[name](getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextShape(Shape):
    """Shape of a transformer of text with a table of positions; the defaults are those of BERT-base.

    width: of the model, d.
    mlp_width: inside the perceptrons.
    max_positions: rows of the table of positions.
    activation: name in `layers.ACTIVATIONS`.
    norm_eps: added to the variance in the layer normalisations.
    """

    vocab_size: int = 30522
    width: int = 768
    mlp_width: int = 3072
    max_positions: int = 512
    activation: str = "gelu"
    norm_eps: float = 1e-12

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width = {self.width}, got {self.num_heads}")


def _check_activation(value: Any) -> None:
    if not isinstance(value, str) or value not in layers.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(layers.ACTIVATIONS)}, got {value!r}")


def _check_norm_eps(value: Any) -> None:
    if type(value) is not float or not 0 < value < 1:
        raise ValueError(f"norm_eps must be a number above 0 and below 1, got {value!r}")


_CHECKS: dict[str, Callable[[Any], None]] = {"activation": _check_activation, "norm_eps": _check_norm_eps}

S = TypeVar("S", bound=Shape)


def read_shape(cls: type[S], fields: Mapping[str, Any], names: Mapping[str, str], **ours: Any) -> S:
    """A Shape from the fields of a `config.json`; what is missing there is the default of the class.

    Args:
      cls: to make.
      fields: of the file.
      names: our name of a field -> theirs.
      **ours: our own options.

    Raises:
      ValueError: for a value that the shape does not allow; names the field as the file does.
    """
    try:
        return cls(**{name: fields[theirs] for name, theirs in names.items() if theirs in fields}, **ours)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise ValueError(f"{names.get(name, name)} {problem}") from None


def refuse(fields: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError for a field that asks for what is not computed.

    Args:
      fields: of a `config.json`.
      computed: name of a field -> the values that are, () for none; a field that is missing or null asks for nothing.
    """
    for name, values in computed.items():
        if (value := fields.get(name)) is not None and value not in values:
            allowed = " or ".join(str(one).lower() if isinstance(one, bool) else repr(one) for one in values)
            raise ValueError(f"{name} must be {allowed or 'null'}, got {value!r}")


class HeadClass(NamedTuple):
    """A class of transformers that computes what a family's model does with the head of one task.

    name: of the class.
    task_type: by which PEFT calls its task; "" for one that PEFT has no name for.
    head: its linear module that is the head; "" for none.
    prefix: before the names of the family's tensors in it.
    problem_type: of its `config.json`; "" for none.
    fits: `Shape -> bool`: whether it computes what the head sees of a model of that shape.
    """

    name: str
    task_type: str
    head: str
    prefix: str = ""
    problem_type: str = ""
    fits: Callable[[Any], bool] = lambda shape: True


def sequence_classes(name: str, head: str, prefix: str, fits: Callable[[Any], bool]) -> dict[str, HeadClass]:
    """Task -> a class of transformers that labels, or gives one number to, a whole text."""
    problems = {"classification": "single_label_classification", "regression": "regression"}
    return {task: HeadClass(name, "SEQ_CLS", head, prefix, problem, fits) for task, problem in problems.items()}


def token_class(name: str, head: str, prefix: str) -> dict[str, HeadClass]:
    """Task -> a class of transformers that labels each token."""
    return {"token_classification": HeadClass(name, "TOKEN_CLS", head, prefix)}


def next_token_class(name: str, prefix: str) -> dict[str, HeadClass]:
    """Task -> a class of transformers that gives the logits of the next token by the model's own table."""
    return {"causal_lm": HeadClass(name, "CAUSAL_LM", "", prefix)}


def image_class(name: str, prefix: str) -> dict[str, HeadClass]:
    """Task -> a class of transformers that labels an image by its first position."""
    problem = "single_label_classification"
    return {"classification": HeadClass(name, "", "classifier", prefix, problem, lambda shape: shape.pooling == "cls")}


class Family(NamedTuple):
    """Models of one `model_type`, or of several.

    title: by which error messages call it.
    shape: `(fields of config.json, **our options) -> Shape`; raises ValueError for what the family does not compute.
    make: `(Shape, Task, Adapter) -> Model`.
    weights: `Shape -> Table`.
    prefixes: what may stand before the names of tensors: "" in a bare encoder, another in a model with a head.
    ignored: patterns of tensors that a checkpoint may hold and the model does not need.
    renamed: parts of names in older checkpoints -> today's, replaced in this order.
    held: field of the Shape -> the tensor that a checkpoint holds where that is true.
    logits: fields of `held` that are false, too, where the task does not learn the next token.
    classes: name of a task -> the class of transformers that computes it, where there is one.
    """

    title: str
    shape: Callable[..., Any]
    make: Callable[[Any, Task, Adapter], Model]
    weights: Callable[[Any], Table]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = {}
    held: Mapping[str, str] = {}
    logits: tuple[str, ...] = ()
    classes: Mapping[str, HeadClass] = {}

    def head_class(self, task: str, shape: Any) -> HeadClass | None:
        """The class of transformers for this task on a model of this shape; None where there is none."""
        found = self.classes.get(task)
        return found if found and found.fits(shape) else None
