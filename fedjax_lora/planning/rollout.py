"""Rollouts: the run itself, shortened, at several ranks and seeds in one program."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core import trees
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.methods import Controller
from fedjax_lora.core.types import FedState, LinkState
from fedjax_lora.planning.pilot import at_rank
from fedjax_lora.sim.cohort import choose, padded_size
from fedjax_lora.sim.evaluate import Evaluate
from fedjax_lora.sim.parts import Parts, World
from fedjax_lora.sim.round import make_round
from fedjax_lora.training.personal import deployed


class Rollout(NamedTuple):
    """`[candidates, seeds]`: loss and accuracy on the world's test pool at the end, mean latency of a round."""

    loss: Array
    accuracy: Array
    latency_s: Array


def roll_out(
    parts: Parts,
    controller: Callable[[Array], Controller],
    evaluate: Evaluate,
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
    """

    def one(world: World, state: FedState, setting: tuple[Array, Array, Array, Array]):
        rank, V, queue_s, seed = setting
        round_fn = make_round(parts._replace(controller=controller(V)))
        key = jax.random.fold_in(state.key, seed)
        start = at_rank(dataclasses.replace(state, key=key, queue_s=queue_s), rank)
        end, metrics = lax.scan(lambda s, _: round_fn(world, s), start, length=rounds)
        adapters = deployed(end.adapters, end.clients)
        loss, accuracy = evaluate(parts.current_base(world, end), world.data.test, adapters, end.hyper)
        return Rollout(loss, accuracy, jnp.mean(metrics.latency_s))

    @jax.jit
    def every(world: World, state: FedState, rank: Array, V: Array, queue_s: Array):
        number = jnp.arange(rank.size * seeds)
        settings = *(x[number // seeds] for x in (rank, V, queue_s)), number % seeds
        return lax.map(lambda setting: one(world, state, setting), settings)

    return jax.tree.map(lambda x: x.reshape(-1, seeds), every(world, state, rank, V, queue_s))


class Weather(NamedTuple):
    """`[paths, rounds, C]`: what control sees of the channel in each round's cohort."""

    snr_hz: Array
    start_s: Array


def draw_weather(
    parts: Parts, world: World, state: FedState, key: Array, downlink_bits: Array, rounds: int, paths: int
) -> Weather:
    """The cell of `state`, with clients where they are, under cohorts and fading drawn anew."""
    num_clients = world.data.count.shape[0]
    size = padded_size(parts.cohort_size, parts.chunk, parts.mesh.size)

    def path(key: Array) -> Weather:
        def step(link_state: LinkState, number: Array) -> tuple[LinkState, Weather]:
            keys = round_keys(key, number)
            link_state = parts.link.step(link_state, keys.channel, jnp.arange(num_clients))
            ids, present = choose(keys.cohort, num_clients, parts.cohort_size, size)
            cohort, samples = trees.take(link_state, ids), parts.samples(world.data.count[ids])
            bits = jnp.broadcast_to(downlink_bits, ids.shape)
            return link_state, Weather(parts.link.snr_hz(cohort), parts.link.start_s(cohort, samples, bits, present))

        return lax.scan(step, state.link, jnp.arange(rounds))[1]

    return jax.vmap(path)(jax.random.split(key, paths))
