"""Classification: a linear head on the pooled features, cross-entropy, accuracy."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedjax_lora.core.learning import Features, Task
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationOptions(Options):
    """One label out of the data's classes for each example."""

    name: Literal["classification"] = "classification"


def make(options: ClassificationOptions, context: Context) -> Task:
    """Classification into `context.num_classes`. A batch holds `label: [B]` int32; outputs are logits `[B, classes]`.

    Raises:
      ValueError: there are fewer than two classes.
    """
    del options
    num_classes = context.num_classes
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")

    def weigh(own: Batch, count: Array, pool: Batch) -> Array:
        return label_weights(own["label"], count, pool["label"], num_classes)

    return Task(
        head=lambda key, d, bias: init_head(key, d, num_classes, bias),
        read=read,
        loss=lambda logits, batch, weight: cross_entropy(logits, batch["label"], weight),
        score=score,
        finish=finish,
        weigh=weigh,
    )


METHOD = Method("task", "classification", ClassificationOptions, make)


def init_head(key: Array, d: int, num_classes: int, bias: bool = True) -> dict[str, Array]:
    """A fresh `{"w": [d, classes], "b": [classes]}`, or `w` alone."""
    head = {"w": 0.02 * jax.random.normal(key, (d, num_classes))}
    return {**head, "b": jnp.zeros(num_classes)} if bias else head


def read(head: Mapping[str, Array], features: Features) -> Array:
    """`[B, classes]` logits of the pooled features."""
    return linear(head, features.pooled())


def linear(head: Mapping[str, Array], x: Array) -> Array:
    """`[..., d] -> [..., columns]` by a head `w`, and `b` where it has one."""
    y = x @ head["w"]
    return y + head["b"] if "b" in head else y


def cross_entropy(logits: Array, label: Array, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the examples of weight 1; `[B, classes]`, `[B]`, `[B]` -> scalar."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def score(logits: Array, batch: Batch) -> dict[str, Array]:
    """`[B]` each: `loss`, cross-entropy in nats; `correct`, see `hits`."""
    label = batch["label"]
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
        "correct": hits(logits, label),
    }


def finish(means: Mapping[str, Array]) -> dict[str, Array]:
    """The mean loss and the accuracy of a pool."""
    return {"eval_loss": means["loss"], "eval_accuracy": means["correct"]}


def hits(logits: Array, label: Array) -> Array:
    """`[B]`: 1 where the label has the largest of the logits `[B, classes]`, else 0; NaN where one is not finite."""
    finite = jnp.all(jnp.isfinite(logits), -1)
    return jnp.where(finite, jnp.argmax(logits, -1) == label, jnp.nan)


def label_weights(own: Array, count: Array, pool: Array, num_classes: int) -> Array:
    """`[N_test]` of `p_client(y) / p_test(y)`, the ratio of shares, at the labels of a pool.

    Args:
      own: `[n_max]` labels of a client, of which the first `count` are valid.
      count: scalar.
      pool: `[N_test]` labels.
      num_classes: labels are below it.
    """
    valid = (jnp.arange(own.shape[0]) < count).astype(jnp.float32)
    of_client = jnp.bincount(own, valid, length=num_classes) / jnp.maximum(count, 1)
    of_pool = jnp.bincount(pool, length=num_classes) / pool.shape[0]
    return of_client[pool] / of_pool[pool]
