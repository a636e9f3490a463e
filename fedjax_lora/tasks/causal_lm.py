"""Causal language modelling: the next token by the model's own table, cross-entropy, perplexity, token accuracy."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Features, Learned, Logits, Task
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.tasks import positions
from fedjax_lora.tasks.common import TaskOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLmOptions(TaskOptions):
    """The token that follows each position that counts."""

    name: Literal["causal_lm"] = "causal_lm"
    learns: ClassVar[Learned] = "next_token"


def make(options: CausalLmOptions, context: Context) -> Task:
    """No head. A batch holds `target: [G, P]`, the token that follows; outputs are logits, see `read`."""
    del context
    return Task(
        head=lambda key, d, bias: {},
        read=read,
        loss=positions.loss,
        score=positions.score,
        finish=finish,
        learns=options.learns,
        judged_by="perplexity",
    )


METHOD = Method("task", "causal_lm", CausalLmOptions, make)


def read(head: Mapping[str, Array], features: Features) -> Array | Logits:
    """`[G, P, vocabulary]` logits of the next token; where they are more than `positions.HELD`, as Logits.

    Raises:
      ValueError: the model has none.
    """
    del head
    logits = features.logits
    if logits is None:
        raise ValueError("task.name must not be causal_lm where the model has no logits of the next token")
    return logits if isinstance(logits, Logits) and logits.size > positions.HELD else logits()


def finish(scores: Mapping[str, Array], weight: Array) -> dict[str, Array]:
    """Loss and accuracy of all tokens of a pool that count, each alike, and the perplexity."""
    found = positions.finish(scores, weight)
    return {**found, "perplexity": jnp.exp(found["eval_loss"])}
