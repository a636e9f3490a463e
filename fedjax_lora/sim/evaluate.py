"""Accuracy and loss on a held-out pool: of the global adapters, and of the clients' own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core.learning import Adapter, Model, Task
from fedjax_lora.core.types import Adapters, Base, Batch, ClientState, Dataset, Packing
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.data.packing import packed
from fedjax_lora.sim.cohort import CLIENTS, map_over_devices, padded_size
from fedjax_lora.training.personal import compose

Evaluate = Callable[[Base, Mapping[str, Array], Adapters, Array, Array], tuple[Array, Array]]
EvaluatePersonal = Callable[[Base, Dataset, Adapters, ClientState, Array], Array]


def make_evaluate(
    model: Model, adapter: Adapter, task: Task, batch_size: int, mesh: Mesh, packing: Packing | None = None
) -> Evaluate:
    """`(base, pool, adapters, rank, scale) -> (mean loss, accuracy)` over the whole pool.

    `rank` is the structural one, and `scale` is s = alpha / r. The devices share the batches. What the task's score
    marks by NaN makes the mean NaN, "not measured". Batches are packed as `packing` has it.
    """

    def evaluate(
        base: Base, pool: Mapping[str, Array], adapters: Adapters, rank: Array, scale: Array
    ) -> tuple[Array, Array]:
        num_examples = _size(pool)
        batches = evaluation_batches(num_examples, batch_size, mesh.shape[CLIENTS])
        used = _used(adapter, adapters, rank, scale)

        def score(shared, rows_and_weight: tuple[Array, Array]) -> dict[str, Array]:
            base, pool, used = shared
            rows, weight = rows_and_weight

            def scored(batch: Batch) -> dict[str, Array]:
                return task.score(model.apply(base, used, batch), batch)

            found = packed(packing, gather(pool, rows), weight, scored)
            return {name: jnp.sum(jnp.where(weight > 0, value, 0.0)) for name, value in found.items()}

        sums = map_over_devices(score, (base, pool, used), batches, 1, mesh)
        found = task.finish({name: jnp.sum(value) / num_examples for name, value in sums.items()})
        return found["eval_loss"], found["eval_accuracy"]

    return evaluate


def make_evaluate_personal(
    model: Model, adapter: Adapter, task: Task, batch_size: int, mesh: Mesh, packing: Packing | None = None
) -> EvaluatePersonal:
    """`(base, data, adapters, clients, scale) -> mean over the K clients of the accuracy of their own adapters`.

    A client's own adapters are what is personal within the global ones, in its own ranks, at the scale s = alpha / r of
    all; who has never taken part still has the start. They are scored where the client would use them: an example of
    the held-out pool has the weight of `Task.weigh` (in classification, the ratio of its label's shares of the
    client's training examples and of the pool), and the accuracy is the weighted mean, NaN where the score of an
    example that counts is. A client for whom the pool has no weight does not enter the mean.

    One client is scored at a time on each device, and each goes through the whole pool: memory is that of one global
    evaluation, time is K of them.
    """

    def evaluate(base: Base, data: Dataset, adapters: Adapters, clients: ClientState, scale: Array) -> Array:
        num_clients, num_examples = data.count.shape[0], _size(data.test)
        batches = evaluation_batches(num_examples, batch_size)
        size = padded_size(num_clients, 1, mesh.shape[CLIENTS])
        items = clients.rank, clients.personal, data.index, data.count
        items = jax.tree.map(lambda leaf: leaf[np.arange(size) % num_clients], items)

        def score(shared, item: tuple[Array, Any, Array, Array]) -> tuple[dict[str, Array], Array]:
            base, data, adapters, scale = shared
            rank, personal, rows, count = item
            used = _used(adapter, compose(adapters, personal), rank, scale)

            def scored(batch: Batch) -> dict[str, Array]:
                return task.score(model.apply(base, used, batch), batch)

            def of_batch(rows_and_weight: tuple[Array, Array]) -> dict[str, Array]:
                rows, weight = rows_and_weight
                return packed(packing, gather(data.test, rows), weight, scored)

            found = {name: value.ravel()[:num_examples] for name, value in lax.map(of_batch, batches).items()}
            if task.weigh is None:
                weight = jnp.ones(num_examples)
            else:
                weight = task.weigh(gather(data.train, rows), count, data.test)
            sums = {name: jnp.sum(jnp.where(weight > 0, value * weight, 0.0)) for name, value in found.items()}
            return sums, jnp.sum(weight)

        sums, weight = map_over_devices(score, (base, data, adapters, scale), items, 1, mesh)
        sums, weight = jax.tree.map(lambda leaf: leaf[:num_clients], (sums, weight))
        scored = weight > 0
        means = {name: value / jnp.where(scored, weight, 1.0) for name, value in sums.items()}
        accuracy = jnp.where(scored, jax.vmap(task.finish)(means)["eval_accuracy"], 0.0)
        return jnp.sum(accuracy) / jnp.sum(scored)

    return evaluate


def _used(adapter: Adapter, adapters: Adapters, rank: Array, scale: Array) -> Adapters:
    """Effective adapters of this rank."""
    mask = rank_mask(rank, max_rank(adapters))
    return Adapters(modules=adapter.effective(adapters.modules, mask, scale), head=adapters.head)


def _size(pool: Mapping[str, Array]) -> int:
    """N."""
    return next(iter(pool.values())).shape[0]
