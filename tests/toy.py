"""A small simulation on digits, quick to compile: what the tests of the engine run."""

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Live
from fedjax_lora.core.learning import Broadcast, Client
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.parts import Parts, World

SETTINGS = (
    "rounds=6",
    "pretrain.steps=2",
    "clients.count=6",
    "clients.partition.alpha=1.0",
    "lora.max_rank=4",
    "lora.rank=3",
    "lora.targets=[query, up]",
    "local.steps=2",
    "local.batch_size=4",
    "control.keep_ratio=0.7",
    "engine.eval_every=3",
    "engine.client_chunk=1",
)


def config(*overrides: str) -> ExperimentConfig:
    return load_config(None, (*SETTINGS, *overrides))


def simulation(*overrides: str) -> Simulation:
    return build(config(*overrides))


def parts(sim: Simulation) -> Parts:
    """What a round is made of, with the configuration's own numbers."""
    return sim.make_parts(sim.numbers)


def broadcast(sim: Simulation, state: FedState, world: World | None = None) -> Broadcast:
    """What a round in which all is trained gives its clients."""
    world = world or sim.world
    live = Live(*map(jnp.float32, Live()))
    scale, correction = parts(sim).scale, state.methods["drift"]
    return Broadcast(world.base, world.data.train, state.adapters, live, correction, scale, state.round)


def clients(sim: Simulation, state: FedState, ids: Array, keys: Array) -> Client:
    """The clients of these ids, or the one of a single id, each with its key."""
    own, data = trees.take(state.clients, ids), sim.world.data
    return Client(data.index[ids], data.count[ids], keys, own.rank, own.personal, own.methods)


def client(sim: Simulation, state: FedState, number: int, key: Array) -> Client:
    """One client in a round whose clients' keys are folded from `key`."""
    return clients(sim, state, number, jax.random.fold_in(key, number))
