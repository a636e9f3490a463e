"""Local training of one client: a few optimizer steps from the global adapters."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core.exchange import Aggregator, Sparsifier
from fedjax_lora.core.learning import Adapter, Broadcast, Client, Correction, Model, Task, Trained, Trainer, Work
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.sides import TrainingOptions
from fedjax_lora.core.types import Adapters, Base, Batch, Scope
from fedjax_lora.data.batches import gather, local_batches
from fedjax_lora.data.packing import packed
from fedjax_lora.ops.products import differences
from fedjax_lora.sparsifiers.diagnostics import orthogonality
from fedjax_lora.training.optimizers import OptimizerConfig, direction, schedule
from fedjax_lora.training.personal import compose


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Work of a client in a round, whoever does it.

    steps: optimizer steps, E.
    batch_size: examples of a step. A client that holds fewer has all of its own in each batch.
    optimizer: of the clients.
    """

    steps: int = 10
    batch_size: int = 8
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTrainingOptions(TrainingOptions):
    """Each client trains the whole model by itself, as the section `local` says; there is nothing more to choose."""

    name: Literal["local"] = "local"


LocalLoss = Callable[[Adapters, Adapters, Base, Array, Array, Batch, Array, Array], tuple[Array, Array]]
"""`(adapters, start, base, scale, rank_mask [R], batch, weight [B], key) -> (objective, loss of the task)`, of a batch.

`start` are the adapters that the client began with; the mask is that of its ranks in use.
"""


def local_loss(model: Model, adapter: Adapter, task: Task, sparsifier: Sparsifier, aggregator: Aggregator) -> LocalLoss:
    """What a client minimises: the task's loss and the penalties of sparsifier and aggregator."""

    def loss(
        adapters: Adapters,
        start: Adapters,
        base: Base,
        scale: Array,
        mask: Array,
        batch: Batch,
        weight: Array,
        key: Array,
    ) -> tuple[Array, Array]:
        modules = adapter.effective(adapters.modules, mask, scale)
        if aggregator.resumes:
            modules = differences(modules, adapter.effective(start.modules, mask, scale))
        outputs = model.apply(base, Adapters(modules=modules, head=adapters.head), batch, key)
        data_loss = task.loss(outputs, batch, weight)
        return data_loss + (sparsifier.penalty(adapters, mask) + aggregator.penalty(adapters, mask)), data_loss

    return loss


def make(options: LocalTrainingOptions, context: Context) -> Trainer:
    """Local training on the client alone."""
    del options  # it has no option yet, but every method is made in the same way
    return Trainer(train=alone(steps_of(context, context.made["model"])), work=whole_work(context.local))


def whole_work(local: LocalConfig) -> Callable[[Array], Work]:
    """`Trainer.work` of a client that trains the whole model."""

    def work(examples: Array) -> Work:
        return Work(samples=local.steps * jnp.minimum(examples, local.batch_size).astype(jnp.float32))

    return work


def drawn_batches(key: Array, client: Client, local: LocalConfig) -> tuple[Array, Array]:
    """Rows and weights of a client's batches, `[E, B]`, by the first of the two keys of `client.key`."""
    return local_batches(key, client.rows, client.examples, local.steps, local.batch_size)


class Course(NamedTuple):
    """What does not change while one client trains in a round.

    start: where it begins. own: its state of the drift's correction. mask: `[R]` of its ranks in use.
    scope: what moves. rows, weight: `[E, B]` of its batches. dropout_key: folded with the number of the step.
    """

    start: Adapters
    own: Any
    mask: Array
    scope: Scope
    rows: Array
    weight: Array
    dropout_key: Array


class Steps(NamedTuple):
    """The steps of local training, for whoever puts them in order.

    begin: `(Broadcast, Client) -> Course`. init: `adapters -> state` of the optimizer.
    gradient: `(Broadcast, Course, adapters, number of the step) -> (gradient, loss)`.
    update: `(Course, gradient, state, adapters, rate) -> (adapters, state)`.
    rates: `number of the round -> [E]` learning rates.
    end: `(Broadcast, Course, adapters, losses [E]) -> Trained`.
    """

    begin: Callable[[Broadcast, Client], Course]
    init: Callable[[Adapters], Any]
    gradient: Callable[[Broadcast, Course, Adapters, Array], tuple[Adapters, Array]]
    update: Callable[[Course, Adapters, Any, Adapters, Array], tuple[Adapters, Any]]
    rates: Callable[[Array], Array]
    end: Callable[[Broadcast, Course, Adapters, Array], Trained]


def steps_of(
    context: Context, model: Model, moving: Callable[[Adapters], Adapters] = lambda adapters: adapters
) -> Steps:
    """The steps of a client that trains this model.

    The frozen base is closed over by the loss and never differentiated. What is not live neither moves nor drifts.

    Args:
      context: the other records that training needs.
      model: what is trained; `context.made["model"]`, or one that computes the same in another way.
      moving: sets to zero what of a gradient, or of an update, is of adapters that stay as they are.
    """
    made, local = context.made, context.local
    correction: Correction = made["drift"]
    aggregator: Aggregator = made["aggregation"]
    loss = local_loss(model, made["adapter"], made["task"], made["sparsifier"], aggregator)
    optimizer, total_steps = direction(local.optimizer), context.rounds * local.steps

    def begin(given: Broadcast, client: Client) -> Course:
        order_key, dropout_key = jax.random.split(client.key)
        rows, weight = drawn_batches(order_key, client, local)
        start = compose(given.adapters, client.personal)
        if aggregator.resumes:
            start = dataclasses.replace(start, modules=client.methods["aggregation"])
        mask = rank_mask(client.rank, max_rank(start))
        scope = Scope(mask, *map(jnp.float32, given.live))
        return Course(start, client.methods["drift"], mask, scope, rows, weight, dropout_key)

    def moved(course: Course, tree: Adapters) -> Adapters:
        return moving(course.scope.select(tree, jax.tree.map(jnp.zeros_like, course.start)))

    def gradient(given: Broadcast, course: Course, adapters: Adapters, number: Array) -> tuple[Adapters, Array]:
        key, weight = jax.random.fold_in(course.dropout_key, number), course.weight[number]
        batch = gather(given.pool, course.rows[number])

        def of_batch(batch: Batch) -> tuple[Adapters, Array]:
            inputs = course.start, given.base, given.scale, course.mask, batch, weight, key
            return jax.grad(loss, has_aux=True)(adapters, *inputs)

        found, data_loss = packed(context.packing if model.packs else None, batch, weight, of_batch)
        found = correction.gradient(found, adapters, course.start, given.correction, course.own)
        return moved(course, found), data_loss

    def update(course: Course, found: Adapters, state: Any, adapters: Adapters, rate: Array) -> tuple[Adapters, Any]:
        updates, state = optimizer.update(found, state, adapters)
        return jax.tree.map(lambda x, u: x - rate * u, adapters, moved(course, updates)), state

    def rates(round_number: Array) -> Array:
        steps = round_number * local.steps + jnp.arange(local.steps)
        return local.optimizer.learning_rate * schedule(local.optimizer, total_steps, steps)

    def end(given: Broadcast, course: Course, adapters: Adapters, losses: Array) -> Trained:
        path = jnp.sum(rates(given.round))
        own = correction.next_client(course.start, adapters, path, course.scope, given.correction, course.own)
        return Trained(adapters, jnp.mean(losses), own, orthogonality(adapters, course.mask))

    return Steps(begin, optimizer.init, gradient, update, rates, end)


def alone(steps: Steps) -> Callable[[Broadcast, Client], Trained]:
    """`Trainer.train`: the steps of one client, one after the other."""

    def train(given: Broadcast, client: Client) -> Trained:
        course, rate = steps.begin(given, client), steps.rates(given.round)

        def step(carry: tuple[Adapters, Any], number: Array):
            adapters, state = carry
            found, data_loss = steps.gradient(given, course, adapters, number)
            return steps.update(course, found, state, adapters, rate[number]), data_loss

        first = course.start, steps.init(course.start)
        (adapters, _), losses = lax.scan(step, first, jnp.arange(rate.shape[0]))
        return steps.end(given, course, adapters, losses)

    return train


METHOD = Method("training", "local", LocalTrainingOptions, make)
