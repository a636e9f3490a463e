"""What tasks of each position share: cross-entropy over the positions that count, in rows of one example or of several.

A batch holds `target: [G, P]` int32, IGNORED where a position does not count; how examples share rows is told by
`data.packing`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedjax_lora.core.types import IGNORED, Batch
from fedjax_lora.tasks.common import hits, total


def loss(logits: Array, batch: Batch, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the positions that count of the examples of weight 1; 0 without any.

    Args:
      logits: `[G, P, classes]`.
      batch: with `target`.
      weight: `[B]`.
    """
    places = place_weight(batch, weight)
    each = cross_entropy(logits, jnp.where(places > 0, batch["target"], IGNORED))
    return jnp.sum(each) / jnp.maximum(jnp.sum(places), 1.0)


def score(logits: Array, batch: Batch) -> dict[str, Array]:
    """`[B]` each, summed over the positions of an example that count.

    `loss`: cross-entropy, nats. `correct`: see `hits`. `positions`: how many they are.
    """
    target = batch["target"]
    counts = target != IGNORED
    return {
        "loss": by_example(batch, cross_entropy(logits, target)),
        "correct": by_example(batch, jnp.where(counts, hits(logits, target), 0.0)),
        "positions": by_example(batch, counts.astype(jnp.float32)),
    }


def finish(scores: Mapping[str, Array], weight: Array) -> dict[str, Array]:
    """Loss and accuracy of all positions of a pool that count, each alike."""
    positions = total(scores["positions"], weight)
    return {
        "eval_loss": total(scores["loss"], weight) / positions,
        "eval_accuracy": total(scores["correct"], weight) / positions,
    }


def place_weight(batch: Batch, weight: Array) -> Array:
    """`[G, P]`: the weight `[B]` of the example that lies at a place, and 0 where the place does not count."""
    if "example_ids" in batch:
        own = jnp.take(weight, batch["example_ids"], mode="fill", fill_value=0)
    else:
        own = weight[:, None]
    return jnp.where(batch["target"] != IGNORED, own, 0.0)


def by_example(batch: Batch, values: Array) -> Array:
    """`[G, P] -> [B]`: sums over the places of each example."""
    if "example_ids" not in batch:
        return values.sum(1)
    number = batch["first_places"].shape[0]
    return jax.ops.segment_sum(values.ravel(), batch["example_ids"].ravel(), number)


def cross_entropy(logits: Array, target: Array) -> Array:
    """`[..., classes]`, `[...]` -> `[...]` in nats, 0 where the target is IGNORED."""
    counts = target != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, target, 0))
    return jnp.where(counts, each, 0.0)
