"""Token classification: a linear head on each position, cross-entropy and accuracy over the positions that count."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from jax import Array

from fedjax_lora.core.learning import Features, Learned, Task
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.tasks import positions
from fedjax_lora.tasks.common import TaskOptions, check_classes, init_head, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(TaskOptions):
    """One label out of the data's classes for each position that counts."""

    name: Literal["token_classification"] = "token_classification"
    learns: ClassVar[Learned] = "token_label"


def make(options: TokenClassificationOptions, context: Context) -> Task:
    """Labels of `context.num_classes`. A batch holds `target: [G, P]`; outputs are logits `[G, P, classes]`.

    Raises:
      ValueError: there are fewer than two classes.
    """
    check_classes(context.num_classes)
    return Task(
        head=lambda key, d, bias: init_head(key, d, context.num_classes),  # whatever the pooling: none is pooled
        read=read,
        loss=positions.loss,
        score=positions.score,
        finish=positions.finish,
        learns=options.learns,
    )


METHOD = Method("task", "token_classification", TokenClassificationOptions, make)


def read(head: Mapping[str, Array], features: Features) -> Array:
    """`[G, P, classes]` logits of each position."""
    return linear(head, features.hidden.values)
