"""Accuracy and loss of the global adapters on a held-out pool."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from fedjax_lora.base import Adapters, Base, Hyper, Model
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.lora.adapters import effective, rank_mask
from fedjax_lora.sim.cohort import map_over_devices, padded_size
from fedjax_lora.sim.local import max_rank

Evaluate = Callable[[Base, Mapping[str, Array], Adapters, Hyper], tuple[Array, Array]]


def make_evaluate(model: Model, batch_size: int, mesh: Mesh) -> Evaluate:
    """`(base, pool, adapters, hyper) -> (mean cross-entropy in nats, accuracy)` over the whole pool.

    The devices share the batches.
    """

    def evaluate(base: Base, pool: Mapping[str, Array], adapters: Adapters, hyper: Hyper) -> tuple[Array, Array]:
        num_examples = pool["label"].shape[0]
        num_batches = padded_size(-(-num_examples // batch_size), 1, mesh.size)
        batches = evaluation_batches(num_examples, batch_size, num_batches)
        used = effective(adapters, rank_mask(hyper.rank, max_rank(adapters)), hyper.alpha / hyper.rank)

        def score(shared, rows_and_weight: tuple[Array, Array]) -> tuple[Array, Array]:
            base, pool, used = shared
            rows, weight = rows_and_weight
            batch = gather(pool, rows)
            logits = model.apply(base, used, batch)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            correct = jnp.argmax(logits, -1) == batch["label"]
            return jnp.sum(loss * weight), jnp.sum(correct * weight)

        loss, correct = map_over_devices(score, (base, pool, used), batches, 1, mesh)
        return jnp.sum(loss) / num_examples, jnp.sum(correct) / num_examples

    return evaluate
