"""Rollouts: the run itself, shortened, at several ranks and seeds in one program."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.types import FedState
from fedjax_lora.planning.pilot import at_rank
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.parts import World
from fedjax_lora.sim.round import make_round
from fedjax_lora.sim.scores import score


class Rollout(NamedTuple):
    """`[candidates, seeds]`: loss and accuracy on the world's test pool at the end, mean latency of a round."""

    loss: Array
    accuracy: Array
    latency_s: Array


def roll_out(
    simulation: Simulation,
    world: World,
    state: FedState,
    rank: Array,
    V: Array,
    queue_s: Array,
    seeds: int,
    rounds: int,
) -> Rollout:
    """Runs of so many rounds from `state`, at each `rank` `[n]` with its `V` and first queue `[n]`.

    Each seed has its own keys. Seeds are shared by the ranks: what differs between two ranks is not their luck.

    Args:
      simulation: whose control is `tsfa`.
      world: the simulation's, or that with another test pool.
      state: before the first of the rounds.
      rank, V, queue_s: `[n]`.
      seeds: of each.
      rounds: of each run.
    """
    make_parts, round_fn = simulation.make_parts, make_round(simulation.make_parts)

    def one(world: World, state: FedState, setting: tuple[Array, Array, Array, Array]) -> Rollout:
        rank, V, queue_s, seed = setting
        start = at_plan(dataclasses.replace(state, key=jax.random.fold_in(state.key, seed)), rank, V, queue_s)
        end, metrics = lax.scan(lambda s, _: round_fn(world, s), start, length=rounds)
        found = score(make_parts(end.numbers), world, end, simulation.program.engine.eval_batch_size)
        return Rollout(found.loss, found.accuracy, jnp.mean(metrics.latency_s))

    @jax.jit
    def every(world: World, state: FedState, rank: Array, V: Array, queue_s: Array) -> Rollout:
        number = jnp.arange(rank.size * seeds)
        settings = *(x[number // seeds] for x in (rank, V, queue_s)), number % seeds
        return lax.map(lambda setting: one(world, state, setting), settings)

    return jax.tree.map(lambda x: x.reshape(-1, seeds), every(world, state, rank, V, queue_s))


def at_plan(state: FedState, rank: Array, V: Array, queue_s: Array) -> FedState:
    """A state before round 1 with this structural rank, V and first queue."""
    state = at_rank(state, rank)
    numbers = {**state.numbers, "control.V": V, "control.queue_s": queue_s}
    control = {**state.methods["control"], "queue_s": jnp.asarray(queue_s, jnp.float32)}
    return dataclasses.replace(state, numbers=numbers, methods={**state.methods, "control": control})
