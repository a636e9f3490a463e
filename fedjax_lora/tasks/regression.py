"""Regression: a linear head of one column on the pooled features, squared error, Pearson's correlation."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Features, Learned, Task
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Batch
from fedjax_lora.tasks.common import TaskOptions, init_head, linear, mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionOptions(TaskOptions):
    """One number for each example, as `num_labels=1` is in Hugging Face's models."""

    name: Literal["regression"] = "regression"
    learns: ClassVar[Learned] = "number"


def make(options: RegressionOptions, context: Context) -> Task:
    """A batch holds `target: [B]` float32; outputs are `[B]`."""
    del context
    return Task(
        head=lambda key, d, bias: init_head(key, d, 1, bias),
        read=read,
        loss=loss,
        score=score,
        finish=finish,
        learns=options.learns,
        judged_by="pearson",
    )


METHOD = Method("task", "regression", RegressionOptions, make)


def read(head: Mapping[str, Array], features: Features) -> Array:
    """`[B]`: the head's one column on the pooled features."""
    return linear(head, features.pooled())[..., 0]


def loss(outputs: Array, batch: Batch, weight: Array) -> Array:
    """Mean squared error over the examples of weight 1."""
    errors = jnp.square(outputs - batch["target"])
    return jnp.sum(errors * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def score(outputs: Array, batch: Batch) -> dict[str, Array]:
    """`[B]` each: `loss`, the squared error; `found` and `target`."""
    target = batch["target"]
    return {"loss": jnp.square(outputs - target), "found": outputs, "target": target}


def finish(scores: Mapping[str, Array], weight: Array) -> dict[str, Array]:
    """The mean squared error and Pearson's correlation; there is no accuracy."""
    return {
        "eval_loss": mean(scores["loss"], weight),
        "eval_accuracy": jnp.float32(jnp.nan),
        "pearson": pearson(scores["found"], scores["target"], weight),
    }


def pearson(x: Array, y: Array, weight: Array) -> Array:
    """Weighted correlation of `[N]` and `[N]`; NaN where either is constant.

    Both are centred before they are multiplied, so that nothing cancels however small their spread is.
    """
    x, y = _standard(x, weight), _standard(y, weight)
    return mean(x * y, weight) / jnp.sqrt(mean(x * x, weight) * mean(y * y, weight))


def _standard(x: Array, weight: Array) -> Array:
    """`x` less its mean, over the largest that is left; NaN where it is constant."""
    x = x - jnp.max(jnp.where(weight > 0, x, -jnp.inf))  # a constant is then 0 exactly
    x = x - mean(x, weight)
    return x / jnp.max(jnp.where(weight > 0, jnp.abs(x), 0.0))
