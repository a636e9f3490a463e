"""What tasks of each position share: cross-entropy over the positions that count, in rows of one example or of several.

A batch holds `target: [G, P]` int32, IGNORED where a position does not count; how examples share rows is told by
`data.packing`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from fedjax_lora.core.learning import Logits
from fedjax_lora.core.types import IGNORED, Batch
from fedjax_lora.tasks.common import hits, total

HELD = 2**24
"""Most logits of a client that are held at a time: 64 MiB in float32. Our choice."""


def loss(logits: Array | Logits, batch: Batch, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the positions that count of the examples of weight 1; 0 without any.

    Args:
      logits: `[G, P, classes]`, or Logits of which no more than HELD are computed at a time.
      batch: with `target`.
      weight: `[B]`.
    """
    places = place_weight(batch, weight)
    each = _each(cross_entropy, logits, jnp.where(places > 0, batch["target"], IGNORED))
    return jnp.sum(each) / jnp.maximum(jnp.sum(places), 1.0)


def score(logits: Array | Logits, batch: Batch) -> dict[str, Array]:
    """`[B]` each, summed over the positions of an example that count.

    `loss`: cross-entropy, nats. `correct`: see `hits`. `positions`: how many they are.
    """
    target = batch["target"]
    counts = target != IGNORED
    losses, correct = _each(lambda *given: (cross_entropy(*given), hits(*given)), logits, target)
    return {
        "loss": by_example(batch, losses),
        "correct": by_example(batch, jnp.where(counts, correct, 0.0)),
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


def _each(measure: Callable[[Array, Array], Any], logits: Array | Logits, target: Array) -> Any:
    """`[G, P]` by a measure of logits `[..., classes]` and targets `[...]`.

    Logits are computed for as many positions at a time as HELD allows, and again in the backward pass.
    """
    if not isinstance(logits, Logits):
        return measure(logits, target)
    number = target.size
    parts = -(-number // max(HELD // logits.words.shape[0], 1))
    together = -(-number // parts)

    def of_part(part: tuple[Array, Array]) -> Any:
        values, target = part
        return measure(logits.product(values, logits.words), target)

    values = logits.values.reshape(number, -1)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, parts * together - number), *[(0, 0)] * (x.ndim - 1)]).reshape(
            parts, together, *x.shape[1:]
        ),
        (values, target.ravel()),
    )
    found = lax.map(jax.checkpoint(of_part), padded)
    return jax.tree.map(lambda x: x.ravel()[:number].reshape(target.shape), found)


def cross_entropy(logits: Array, target: Array) -> Array:
    """`[..., classes]`, `[...]` -> `[...]` in nats, 0 where the target is IGNORED."""
    counts = target != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, target, 0))
    return jnp.where(counts, each, 0.0)
