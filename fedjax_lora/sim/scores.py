"""An evaluation of a state, and its place in the metrics of the rounds before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.sim.evaluate import make_evaluate, make_evaluate_personal, of_clients
from fedjax_lora.sim.merged import current_base
from fedjax_lora.sim.parts import Parts, World
from fedjax_lora.training.personal import deployed


class Scores(NamedTuple):
    """An evaluation: as `eval_loss`, `eval_accuracy`, `personal_accuracy` and `task/name` of `Metrics`.

    more: name -> what else the task finds, and `worst_tenth_accuracy` where clients differ in it.
    """

    loss: Array
    accuracy: Array
    personal: Array
    more: dict[str, Array]

    def named(self, name: str) -> Array:
        """`accuracy`, or what else the task finds by this name."""
        return self.accuracy if name == "accuracy" else self.more[name]


def with_scores(rows: Metrics, scores: Scores, number: int) -> Metrics:
    """The first `number` rows, on the host, the last of them with the evaluation after it."""
    metrics = jax.tree.map(lambda x: np.array(x[:number]), rows)
    metrics.eval_loss[-1], metrics.eval_accuracy[-1] = scores.loss, scores.accuracy
    metrics.personal_accuracy[-1] = scores.personal
    for name, value in scores.more.items():
        metrics.methods[f"task/{name}"] = np.append(np.full(number - 1, np.nan, np.float32), value)
    return metrics


def score(parts: Parts, world: World, state: FedState, batch_size: int) -> Scores:
    """The evaluation of a state on the held-out pool of the world."""
    base, adapters = current_base(parts, world, state), deployed(state.adapters, state.clients)
    of = parts.model, parts.adapter, parts.task, batch_size, parts.layout
    scores = make_evaluate(*of)(base, world.data.test, adapters, parts.rank, parts.scale)
    more = parts.task.finish(scores, jnp.ones(world.data.test["label"].shape))
    loss, accuracy, personal = more.pop("eval_loss"), more.pop("eval_accuracy"), jnp.float32(jnp.nan)
    if parts.aggregator.personal:
        clients = make_evaluate_personal(*of)(base, world.data, state.adapters, state.clients, parts.scale)
        personal = clients.mean()
    else:
        clients = of_clients(parts.task, world.data, scores)
    if clients is not None:
        more["worst_tenth_accuracy"] = clients.worst_tenth()
    return Scores(loss, accuracy, personal, more)
