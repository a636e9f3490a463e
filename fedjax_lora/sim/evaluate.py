"""Accuracy and loss of the global adapters on a held-out pool."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jax import Array, lax

from fedjax_lora.base import Adapters, Base, Hyper, Model
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.lora.adapters import effective, rank_mask
from fedjax_lora.sim.local import max_rank

Evaluate = Callable[[Base, Mapping[str, Array], Adapters, Hyper], tuple[Array, Array]]


def make_evaluate(model: Model, batch_size: int) -> Evaluate:
    """`(base, pool, adapters, hyper) -> (mean cross-entropy in nats, accuracy)` over the whole pool."""

    def evaluate(base: Base, pool: Mapping[str, Array], adapters: Adapters, hyper: Hyper) -> tuple[Array, Array]:
        num_examples = pool["label"].shape[0]
        rows, weight = evaluation_batches(num_examples, batch_size)
        used = effective(adapters, rank_mask(hyper.rank, max_rank(adapters)), hyper.alpha / hyper.rank)

        def score(batch_rows: Array, batch_weight: Array) -> tuple[Array, Array]:
            batch = gather(pool, batch_rows)
            logits = model.apply(base, used, batch)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            correct = jnp.argmax(logits, -1) == batch["label"]
            return jnp.sum(loss * batch_weight), jnp.sum(correct * batch_weight)

        loss, correct = lax.map(lambda batch: score(*batch), (rows, weight))
        return jnp.sum(loss) / num_examples, jnp.sum(correct) / num_examples

    return evaluate
