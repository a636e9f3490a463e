"""Scores on a held-out pool: of the global adapters, also as each client would see them, and of the clients' own."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core.learning import Adapter, Model, Task
from fedjax_lora.core.types import Adapters, Base, Batch, ClientState, Dataset
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.data.packing import packed
from fedjax_lora.data.pool import CohortRows
from fedjax_lora.data.sampled import Sampled
from fedjax_lora.sim.cohort import padded_size
from fedjax_lora.sim.parts import Layout
from fedjax_lora.training.personal import compose

Evaluate = Callable[[Base, Mapping[str, Array], Adapters, Array, Array], dict[str, Array]]
EvaluatePersonal = Callable[[Base, Dataset, Adapters, ClientState, Array], "ClientAccuracy"]

_AT_ONCE = 64
"""Clients whose weights of the pool are computed side by side."""

SCORED = 1024
"""Clients, of a population that is sampled, whose accuracies stand for those of all: the first of them, which are as
good as any."""


class ClientAccuracy(NamedTuple):
    """`[K]` each: the accuracy on examples like a client's own, and whether the pool has any such example."""

    accuracy: Array
    counts: Array

    def mean(self) -> Array:
        """Of the clients that count."""
        return jnp.sum(jnp.where(self.counts, self.accuracy, 0.0)) / jnp.sum(self.counts)

    def worst_tenth(self) -> Array:
        """Mean of the least tenth, rounded up, of the clients that count; NaN where one of these is not measured."""
        number = (jnp.sum(self.counts) + 9) // 10
        least = jnp.sort(jnp.where(self.counts, self.accuracy, jnp.inf))
        mean = jnp.sum(jnp.where(jnp.arange(least.shape[0]) < number, least, 0.0)) / number
        return jnp.where(jnp.any(self.counts & jnp.isnan(self.accuracy)), jnp.nan, mean)


def make_evaluate(model: Model, adapter: Adapter, task: Task, batch_size: int, layout: Layout) -> Evaluate:
    """`(base, pool, adapters, rank, scale) -> {name: [N]}`: the task's scores of the whole pool.

    `rank` is the structural one, and `scale` is s = alpha / r. The devices share the batches, which are packed as
    `layout.packing` has it.
    """

    def evaluate(
        base: Base, pool: Mapping[str, Array], adapters: Adapters, rank: Array, scale: Array
    ) -> dict[str, Array]:
        num_examples = _size(pool)
        batches = evaluation_batches(num_examples, batch_size, 1 if layout.in_order else layout.num_devices)
        used = used_adapters(adapter, adapters, rank, scale)

        def score(shared, rows_and_weight: tuple[Array, Array]) -> dict[str, Array]:
            base, pool, used = shared
            rows, weight = rows_and_weight

            def scored(batch: Batch) -> dict[str, Array]:
                return task.score(model.apply(base, used, batch), batch)

            return packed(layout.packing, gather(pool, rows), weight, scored)

        found = layout.map(score, (base, pool, used), batches, 1, of_model=True)
        return {name: value.ravel()[:num_examples] for name, value in found.items()}

    return evaluate


def of_clients(task: Task, data: Dataset, scores: Mapping[str, Array]) -> ClientAccuracy | None:
    """The accuracy of one model where each client would use it, from its scores of the held-out pool.

    An example has the weight of `Task.weigh`; None where all clients weigh alike. Of a population that is sampled,
    SCORED clients are scored.
    """
    weigh = task.weigh
    if weigh is None:
        return None

    def of_client(item: tuple[Any, Array]) -> tuple[Array, Array]:
        own, count = item
        weight = weigh(own_examples(data, own), count, data.test)
        return task.finish(scores, weight)["eval_accuracy"], jnp.any(weight > 0)

    return ClientAccuracy(*lax.map(of_client, scored_clients(data), batch_size=_AT_ONCE))


def scored_clients(data: Dataset) -> tuple[Any, Array]:
    """Rows and number of examples of the clients that are scored: all, or SCORED of a population that is sampled.

    Where the training pool is on the host, it is the examples themselves, as far as they are at hand.
    """
    if isinstance(data.index, CohortRows):
        own = data.index.scored
        return own, data.count[: own["label"].shape[0]]
    if isinstance(data.index, Sampled):
        number = min(data.count.shape[0], SCORED)
        return data.index[jnp.arange(number)], data.count[:number]
    return data.index, data.count


def own_examples(data: Dataset, own: Any) -> Batch:
    """The examples `[n_max, ...]` of one of `scored_clients`."""
    return own if isinstance(own, Mapping) else gather(data.train, own)


def make_evaluate_personal(
    model: Model, adapter: Adapter, task: Task, batch_size: int, layout: Layout
) -> EvaluatePersonal:
    """`(base, data, adapters, clients, scale) -> ClientAccuracy` of the clients' own adapters.

    A client's own adapters are what is personal within the global ones, in its own ranks, at the scale s = alpha / r of
    all; who has never taken part still has the start. They are scored where the client would use them: an example of
    the held-out pool has the weight of `Task.weigh` (in classification, the ratio of its label's shares of the
    client's training examples and of the pool), and the accuracy is the weighted mean, NaN where the score of an
    example that counts is. A client for whom the pool has no weight does not count.

    One client is scored at a time on each device, and each goes through the whole pool: memory is that of one global
    evaluation, time is K of them; or SCORED of them, where the population is sampled.
    """

    def evaluate(base: Base, data: Dataset, adapters: Adapters, clients: ClientState, scale: Array) -> ClientAccuracy:
        (own, count), num_examples = scored_clients(data), _size(data.test)
        num_clients = count.shape[0]
        batches = evaluation_batches(num_examples, batch_size)
        size = padded_size(num_clients, 1, layout.num_devices)
        items = clients.rank, clients.personal, own, count
        items = jax.tree.map(lambda leaf: leaf[np.arange(size) % num_clients], items)

        def score(shared, item: tuple[Array, Any, Any, Array]) -> ClientAccuracy:
            base, data, adapters, scale = shared
            rank, personal, own, count = item
            used = used_adapters(adapter, compose(adapters, personal), rank, scale)

            def scored(batch: Batch) -> dict[str, Array]:
                return task.score(model.apply(base, used, batch), batch)

            def of_batch(rows_and_weight: tuple[Array, Array]) -> dict[str, Array]:
                rows, weight = rows_and_weight
                return packed(layout.packing, gather(data.test, rows), weight, scored)

            found = {name: value.ravel()[:num_examples] for name, value in lax.map(of_batch, batches).items()}
            if task.weigh is None:
                weight = jnp.ones(num_examples)
            else:
                weight = task.weigh(own_examples(data, own), count, data.test)
            return ClientAccuracy(task.finish(found, weight)["eval_accuracy"], jnp.any(weight > 0))

        found = layout.map(score, (base, data, adapters, scale), items, 1, of_model=True)
        return jax.tree.map(lambda leaf: leaf[:num_clients], found)

    return evaluate


def used_adapters(adapter: Adapter, adapters: Adapters, rank: Array, scale: Array) -> Adapters:
    """Effective adapters of this rank."""
    mask = rank_mask(rank, max_rank(adapters))
    return Adapters(modules=adapter.effective(adapters.modules, mask, scale), head=adapters.head)


def _size(pool: Mapping[str, Array]) -> int:
    """N."""
    return next(iter(pool.values())).shape[0]
