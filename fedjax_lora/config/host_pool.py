"""A training pool that stays on the host: for whom, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.config.values import key_of
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.types import Dataset
from fedjax_lora.data.arrays import Pool
from fedjax_lora.data.batches import federated_dataset
from fedjax_lora.data.examples import Examples
from fedjax_lora.data.partition import Partition
from fedjax_lora.data.pool import mapped
from fedjax_lora.sim.feed import Feed


def dataset(config: ExperimentConfig, examples: Examples, split_data: Partition) -> tuple[Dataset, Feed | None]:
    """The data as the device holds them, and what brings the training pool, where that stays on the host."""
    if config.engine.data == "device":
        return federated_dataset(examples, split_data), None
    clients = config.clients
    rounds = min(config.engine.eval_every, config.rounds)
    feed = Feed(mapped(examples.train), split_data, clients.per_round or clients.count, rounds)
    return feed.dataset(examples.test), feed


def check(config: ExperimentConfig, made: dict[str, Any], test: Pool) -> None:
    """Refuse what needs more of the pool than the cohorts that are known before a segment.

    Args:
      config: of an experiment.
      made: slot -> its record.
      test: the held-out pool.

    Raises:
      ConfigError: names the key, and what it is that needs the pool.
    """
    if config.engine.data == "device":
        return
    trainer = made["training"]
    found = {
        "control": made["control"].schedule is not None and "which chooses the clients of a round in the round",
        "arrival": made["arrival"].takes is not None and "in which clients begin at times of their own",
        "training": (trainer.exchange is not None or bool(jax.tree.leaves(jax.eval_shape(trainer.init))))
        and "which looks at the examples of all clients",
        "task": not _weighs_by_label(made["task"], test) and "which weighs clients by more than their labels",
    }
    for slot, why in found.items():
        if why:
            name = getattr(config, slot).name
            raise ConfigError(f"engine.data must be device where {slot}.{key_of(slot)} is {name}, {why}, got 'host'")


def check_sweep(config: ExperimentConfig) -> None:
    """Raise ConfigError where trials side by side would share a pool that is on the host."""
    if config.engine.data != "device":
        raise ConfigError(f"engine.data must be device in a sweep, got {config.engine.data!r}")


def _weighs_by_label(task: Any, test: Pool) -> bool:
    """Whether what a task weighs the held-out pool by are the labels of a client's examples alone."""
    if task.weigh is None:
        return True
    own = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    try:
        jax.eval_shape(task.weigh, own, jax.ShapeDtypeStruct((), jnp.int32), dict(test))
    except KeyError:
        return False
    return True
