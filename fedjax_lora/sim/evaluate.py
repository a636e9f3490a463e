"""Accuracy and loss on a held-out pool: of the global adapters, and of the clients' own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

from fedjax_lora.adapters.lora import effective, max_rank, rank_mask
from fedjax_lora.core.methods import Model
from fedjax_lora.core.types import Adapters, Base, ClientState, Dataset, Hyper
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.sim.cohort import map_over_devices, padded_size
from fedjax_lora.training.personal import compose

Evaluate = Callable[[Base, Mapping[str, Array], Adapters, Hyper], tuple[Array, Array]]
EvaluatePersonal = Callable[[Base, Dataset, Adapters, ClientState, Hyper], Array]


def make_evaluate(model: Model, batch_size: int, mesh: Mesh) -> Evaluate:
    """`(base, pool, adapters, hyper) -> (mean cross-entropy in nats, accuracy)` over the whole pool.

    The devices share the batches. The accuracy is NaN, "not measured", where a logit is not finite.
    """

    def evaluate(base: Base, pool: Mapping[str, Array], adapters: Adapters, hyper: Hyper) -> tuple[Array, Array]:
        num_examples = pool["label"].shape[0]
        batches = evaluation_batches(num_examples, batch_size, mesh.size)
        used = effective(adapters, rank_mask(hyper.rank, max_rank(adapters)), hyper.alpha / hyper.rank)

        def score(shared, rows_and_weight: tuple[Array, Array]) -> tuple[Array, Array]:
            base, pool, used = shared
            rows, weight = rows_and_weight
            batch = gather(pool, rows)
            logits = model.apply(base, used, batch)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.sum(loss * weight), jnp.sum(hits(logits, batch["label"]) * weight)

        loss, correct = map_over_devices(score, (base, pool, used), batches, 1, mesh)
        return jnp.sum(loss) / num_examples, jnp.sum(correct) / num_examples

    return evaluate


def make_evaluate_personal(model: Model, batch_size: int, num_classes: int, mesh: Mesh) -> EvaluatePersonal:
    """`(base, data, adapters, clients, hyper) -> mean over the K clients of the accuracy of their own adapters`.

    A client's own adapters are what it keeps within the global ones, in its own ranks; who has never taken part still
    keeps the start. They are scored where the client would use them: an example of label y in the held-out pool
    weighs `p_client(y) / p_test(y)`, the ratio of y's shares of the client's training examples and of the pool, and
    the accuracy is the weighted mean, NaN where a logit is not finite. A client of whose labels the pool has none does
    not enter the mean.

    One client is scored at a time on each device, and each goes through the whole pool: memory is that of one global
    evaluation, time is K of them.
    """

    def evaluate(base: Base, data: Dataset, adapters: Adapters, clients: ClientState, hyper: Hyper) -> Array:
        num_clients, num_examples = data.count.shape[0], data.test["label"].shape[0]
        batches = evaluation_batches(num_examples, batch_size)
        size = padded_size(num_clients, 1, mesh.size)
        items = clients.rank, clients.kept, data.index, data.count
        items = jax.tree.map(lambda leaf: leaf[np.arange(size) % num_clients], items)

        def score(shared, item: tuple[Array, Any, Array, Array]) -> tuple[Array, Array]:
            base, data, adapters, hyper = shared
            rank, kept, rows, count = item
            mask = rank_mask(rank, max_rank(adapters))
            used = effective(compose(adapters, kept), mask, hyper.alpha / hyper.rank)

            def correct(rows_and_weight: tuple[Array, Array]) -> Array:
                batch = gather(data.test, rows_and_weight[0])
                return hits(model.apply(base, used, batch), batch["label"])

            right = lax.map(correct, batches).ravel()[:num_examples]
            weight = label_weights(data.train["label"][rows], count, data.test["label"], num_classes)
            return jnp.sum(jnp.where(weight > 0, right * weight, 0.0)), jnp.sum(weight)

        right, weight = map_over_devices(score, (base, data, adapters, hyper), items, 1, mesh)
        scored = weight[:num_clients] > 0
        accuracy = jnp.where(scored, right[:num_clients] / jnp.where(scored, weight[:num_clients], 1.0), 0.0)
        return jnp.sum(accuracy) / jnp.sum(scored)

    return evaluate


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


def nothing_personal(base: Base, data: Dataset, adapters: Adapters, clients: ClientState, hyper: Hyper) -> Array:
    """The `EvaluatePersonal` of a method whose clients keep nothing: NaN, "not measured"."""
    del base, data, adapters, clients, hyper
    return jnp.float32(jnp.nan)
