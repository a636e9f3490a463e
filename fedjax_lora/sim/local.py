"""Local training of one client: a few optimizer steps from the global adapters."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from fedjax_lora.base import Adapters, Base, Batch, Hyper, Model, Sparsifier
from fedjax_lora.data.batches import gather, local_batches
from fedjax_lora.lora.adapters import effective, rank_mask
from fedjax_lora.sim.optimizers import Optimizer, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Local training: `steps` optimizer steps a round on batches of `batch_size` examples."""

    steps: int = 10
    batch_size: int = 8
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


class Client(NamedTuple):
    """What one client trains on; the round maps over a leading cohort axis.

    rows: `[n_max]` rows of the pool. examples: how many of them are valid. key: the client's own.
    """

    rows: Array
    examples: Array
    key: Array


class Trained(NamedTuple):
    """What local training leaves: the adapters and the mean cross-entropy over the steps."""

    adapters: Adapters
    loss: Array


Train = Callable[[Base, dict[str, Array], Adapters, Hyper, Array, Client], Trained]


def cross_entropy(logits: Array, label: Array, weight: Array) -> Array:
    """Mean cross-entropy, nats, over the examples with weight 1; `[B, classes]`, `[B]`, `[B]` -> scalar."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def local_loss(model: Model, sparsifier: Sparsifier) -> Callable[..., tuple[Array, Array]]:
    """`(adapters, base, hyper, batch, weight, key) -> (objective, cross-entropy)` of one batch."""

    def loss(
        adapters: Adapters, base: Base, hyper: Hyper, batch: Batch, weight: Array, key: Array
    ) -> tuple[Array, Array]:
        mask = rank_mask(hyper.rank, max_rank(adapters))
        used = effective(adapters, mask, hyper.alpha / hyper.rank)
        data_loss = cross_entropy(model.apply(base, used, batch, key), batch["label"], weight)
        return data_loss + hyper.orthogonality * sparsifier.penalty(adapters, mask), data_loss

    return loss


def max_rank(adapters: Adapters) -> int:
    """R, the static rank that the factors are stored at."""
    return next(iter(adapters.modules.values())).a.shape[-1]


def make_train(
    model: Model,
    sparsifier: Sparsifier,
    direction: Optimizer,
    schedule: optax.Schedule,
    config: LocalConfig,
) -> Train:
    """Local training as `(base, pool, start, hyper, round, client) -> Trained`, for one client.

    The frozen base is closed over by the loss and never differentiated.
    """
    loss = local_loss(model, sparsifier)

    def train(
        base: Base, pool: dict[str, Array], start: Adapters, hyper: Hyper, round_number: Array, client: Client
    ) -> Trained:
        order_key, dropout_key = jax.random.split(client.key)
        rows, weight = local_batches(order_key, client.rows, client.examples, config.steps, config.batch_size)

        def step(carry, inputs):
            adapters, optimizer_state = carry
            number, rows, weight = inputs
            key = jax.random.fold_in(dropout_key, number)
            gradient, data_loss = jax.grad(loss, has_aux=True)(adapters, base, hyper, gather(pool, rows), weight, key)
            updates, optimizer_state = direction.update(gradient, optimizer_state, adapters)
            rate = hyper.learning_rate * schedule(round_number * config.steps + number)
            adapters = jax.tree.map(lambda x, u: x - rate * u, adapters, updates)
            return (adapters, optimizer_state), data_loss

        inputs = (jnp.arange(config.steps), rows, weight)
        (adapters, _), losses = lax.scan(step, (start, direction.init(start)), inputs)
        return Trained(adapters, jnp.mean(losses))

    return train
