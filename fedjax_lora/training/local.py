"""Local training of one client: a few optimizer steps from the global adapters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from fedjax_lora.adapters.lora import effective, max_rank, rank_mask
from fedjax_lora.core.methods import Aggregator, Drift, Live, Model, Sparsifier
from fedjax_lora.core.types import Adapters, Base, Batch, ClientState, Hyper, Scope
from fedjax_lora.data.batches import gather, local_batches
from fedjax_lora.ops.products import differences
from fedjax_lora.sparsifiers.diagnostics import orthogonality
from fedjax_lora.training.optimizers import Optimizer, OptimizerConfig
from fedjax_lora.training.personal import compose


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Local training: `steps` optimizer steps a round on batches of `batch_size` examples.

    A client that holds fewer has all of its own in each batch.
    """

    steps: int = 10
    batch_size: int = 8
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def samples(self, count: Array) -> Array:
        """`[...]` float32 examples that clients who hold `count` `[...]` compute in a round, see `local_batches`."""
        return self.steps * jnp.minimum(count, self.batch_size).astype(jnp.float32)


class Client(NamedTuple):
    """What one client trains on; the round maps over a leading cohort axis.

    rows: `[n_max]` rows of the pool. examples: how many of them are valid. key: the client's own.
    state: what it carries from its earlier rounds.
    """

    rows: Array
    examples: Array
    key: Array
    state: ClientState


class Trained(NamedTuple):
    """What local training leaves.

    loss: mean cross-entropy over the steps. drift: the client's state of the correction.
    orthogonality: see `sparsifiers.diagnostics`; measured here, where few clients' adapters are held at a time.
    """

    adapters: Adapters
    loss: Array
    drift: Any
    orthogonality: Array


class Broadcast(NamedTuple):
    """What every client of a round is given.

    base: the frozen weights. pool: the examples. adapters: where all start. live: what they train.
    drift: the server's state of the drift correction. hyper, round: the traced numbers and the round's.
    """

    base: Base
    pool: dict[str, Array]
    adapters: Adapters
    live: Live
    drift: Any
    hyper: Hyper
    round: Array


Train = Callable[[Broadcast, Client], Trained]


def cross_entropy(logits: Array, label: Array, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the examples with weight 1; `[B, classes]`, `[B]`, `[B]` -> scalar."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def local_loss(model: Model, sparsifier: Sparsifier, aggregator: Aggregator) -> Callable[..., tuple[Array, Array]]:
    """`(adapters, start, base, hyper, mask, batch, weight, key) -> (objective, cross-entropy)` of one batch.

    start: the adapters that the client began with. mask: `[R]`, its ranks in use.
    """

    def loss(
        adapters: Adapters,
        start: Adapters,
        base: Base,
        hyper: Hyper,
        mask: Array,
        batch: Batch,
        weight: Array,
        key: Array,
    ) -> tuple[Array, Array]:
        used = effective(adapters, mask, hyper.alpha / hyper.rank)
        if aggregator.resumes:
            began = effective(start, mask, hyper.alpha / hyper.rank)
            used = dataclasses.replace(used, modules=differences(used.modules, began.modules))
        data_loss = cross_entropy(model.apply(base, used, batch, key), batch["label"], weight)
        penalty = hyper.orthogonality * sparsifier.penalty(adapters, mask) + aggregator.penalty(adapters, mask)
        return data_loss + penalty, data_loss

    return loss


def make_train(
    model: Model,
    sparsifier: Sparsifier,
    aggregator: Aggregator,
    drift: Drift,
    direction: Optimizer,
    schedule: optax.Schedule,
    config: LocalConfig,
) -> Train:
    """Local training as `(broadcast, client) -> Trained`, for one client.

    The frozen base is closed over by the loss and never differentiated. What is not live neither moves nor drifts.
    """
    loss = local_loss(model, sparsifier, aggregator)

    def train(given: Broadcast, client: Client) -> Trained:
        order_key, dropout_key = jax.random.split(client.key)
        rows, weight = local_batches(order_key, client.rows, client.examples, config.steps, config.batch_size)
        start, hyper = compose(given.adapters, client.state.kept), given.hyper
        if aggregator.resumes:
            start = dataclasses.replace(start, modules=client.state.own)
        mask = rank_mask(client.state.rank, max_rank(start))
        scope = Scope(mask, *map(jnp.float32, given.live))
        zero = jax.tree.map(jnp.zeros_like, start)

        def step(carry, inputs):
            adapters, optimizer_state = carry
            number, rows, weight = inputs
            key = jax.random.fold_in(dropout_key, number)
            batch = gather(given.pool, rows)
            inputs = given.base, hyper, mask, batch, weight, key
            gradient, data_loss = jax.grad(loss, has_aux=True)(adapters, start, *inputs)
            gradient = drift.gradient(gradient, adapters, start, given.drift, client.state.drift)
            updates, optimizer_state = direction.update(scope.select(gradient, zero), optimizer_state, adapters)
            updates = scope.select(updates, zero)
            adapters = jax.tree.map(lambda x, u: x - rates[number] * u, adapters, updates)
            return (adapters, optimizer_state), data_loss

        numbers = jnp.arange(config.steps)
        factors = jnp.broadcast_to(schedule(given.round * config.steps + numbers), numbers.shape)
        rates = hyper.learning_rate * factors
        (adapters, _), losses = lax.scan(step, (start, direction.init(start)), (numbers, rows, weight))
        moved = drift.next_client(start, adapters, jnp.sum(rates), scope, given.drift, client.state.drift)
        return Trained(adapters, jnp.mean(losses), moved, orthogonality(adapters, mask))

    return train
