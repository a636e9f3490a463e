"""Classification: a linear head on the pooled features, cross-entropy, accuracy, F1, Matthews' correlation."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from fedjax_lora.core.learning import Features, Task
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Batch
from fedjax_lora.tasks.common import TaskOptions, check_classes, hits, init_head, linear, mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationOptions(TaskOptions):
    """One label out of the data's classes for each example."""

    name: Literal["classification"] = "classification"


def make(options: ClassificationOptions, context: Context) -> Task:
    """Classification into `context.num_classes`. A batch holds `label: [B]` int32; outputs are logits `[B, classes]`.

    Raises:
      ValueError: there are fewer than two classes.
    """
    num_classes = context.num_classes
    check_classes(num_classes)

    def weigh(own: Batch, count: Array, pool: Batch) -> Array:
        return label_weights(own["label"], count, pool["label"], num_classes)

    return Task(
        head=lambda key, d, bias: init_head(key, d, num_classes, bias),
        read=read,
        loss=lambda logits, batch, weight: cross_entropy(logits, batch["label"], weight),
        score=score,
        finish=lambda scores, weight: finish(scores, weight, num_classes),
        weigh=weigh,
        learns=options.learns,
    )


METHOD = Method("task", "classification", ClassificationOptions, make)


def read(head: Mapping[str, Array], features: Features) -> Array:
    """`[B, classes]` logits of the pooled features."""
    return linear(head, features.pooled())


def cross_entropy(logits: Array, label: Array, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the examples of weight 1; `[B, classes]`, `[B]`, `[B]` -> scalar."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def score(logits: Array, batch: Batch) -> dict[str, Array]:
    """`[B]` each: `loss`, cross-entropy in nats; `correct`, see `hits`; `found` and `label`, int32."""
    label = batch["label"]
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
        "correct": hits(logits, label),
        "found": jnp.argmax(logits, -1).astype(jnp.int32),
        "label": label,
    }


def finish(scores: Mapping[str, Array], weight: Array, num_classes: int) -> dict[str, Array]:
    """What is found of a pool: mean loss, accuracy, `f1` of the second of two classes, `macro_f1` and `matthews`.

    `macro_f1` is the mean over the classes that occur; see `f1` and `matthews`.
    """
    accuracy = mean(scores["correct"], weight)
    counts = count_labels(scores["found"], scores["label"], weight, num_classes)
    each = f1(counts)
    occurs = counts.found + counts.true > 0
    more = {"f1": each[1]} if num_classes == 2 else {}
    more |= {"macro_f1": jnp.sum(each) / jnp.sum(occurs), "matthews": matthews(counts)}
    return {
        "eval_loss": mean(scores["loss"], weight),
        "eval_accuracy": accuracy,
        **{name: jnp.where(jnp.isnan(accuracy), jnp.nan, value) for name, value in more.items()},
    }


class Counts(NamedTuple):
    """`[classes]` each, examples by their weight: found and true; as found; as they are. all: `[]`, of them all."""

    both: Array
    found: Array
    true: Array
    all: Array


def count_labels(found: Array, label: Array, weight: Array, num_classes: int) -> Counts:
    """Of found and true labels `[N]`."""

    def count(labels: Array, weight: Array) -> Array:
        return jnp.bincount(labels, weight, length=num_classes)

    return Counts(
        both=count(label, weight * (found == label)),
        found=count(found, weight),
        true=count(label, weight),
        all=jnp.sum(weight),
    )


def f1(counts: Counts) -> Array:
    """`[classes]`: the harmonic mean of precision and recall of each class; 0 of one that does not occur."""
    either = counts.found + counts.true
    return jnp.where(either > 0, 2 * counts.both / jnp.where(either > 0, either, 1.0), 0.0)


def matthews(counts: Counts) -> Array:
    """Matthews' correlation of found and true labels, of several classes too; 0 where either are all of one class.

    J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004. A class's
    covariance is written by its four cells, since `both * all - found * true` cancels where one class prevails.
    """
    both, found, true = (x / counts.all for x in counts[:3])
    neither = (counts.all - counts.found - counts.true + counts.both) / counts.all
    covariance = jnp.sum(both * neither - (found - both) * (true - both))
    spread = [jnp.sum(x * (counts.all - x)) / counts.all**2 for x in (counts.found, counts.true)]
    size = jnp.sqrt(spread[0] * spread[1])
    return jnp.where(size > 0, covariance / jnp.where(size > 0, size, 1.0), 0.0)


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
