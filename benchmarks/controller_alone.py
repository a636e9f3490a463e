"""Controllers on the channel of a run without training, by what the ranks were worth to one cohort."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedjax_lora import Simulation
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.methods import Controller
from fedjax_lora.core.types import Adapters, FedState
from fedjax_lora.sim.parts import Local, World
from fedjax_lora.sim.round import choose_cohort, control, importance, round_latency, train_locally
from fedjax_lora.training.local import Trained


class Numbers(NamedTuple):
    """Of controllers `[S]`: V, in s^2 over the unit of the tail, and the first queue, in s."""

    V: Array
    queue_s: Array


def tail_energies(simulation: Simulation, state: FedState) -> Array:
    """`[C, R + 1]` of the cohort of the next round after its local training."""
    parts = simulation.parts

    @jax.jit
    def train(world: World, state: FedState) -> Array:
        cohort = choose_cohort(parts, world, state, round_keys(state.key, state.round))
        return importance(parts, cohort, train_locally(parts, world, state, cohort))

    return train(simulation.world, state)


def alone(
    simulation: Simulation,
    make: Callable[[Array], Controller],
    state: FedState,
    keys: Array,
    numbers: Numbers,
    tails: Array,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Latency and sent bits `[P, S, rounds]` by the fading and cohorts of keys `[P]`, for numbers `[S]`.

    `make` gives the controller of a V. Nothing is trained: the tail energies `[C, R + 1]` stay.
    """

    def run(world: World, state: FedState, key: Array, V: Array, queue_s: Array, tails: Array) -> tuple[Array, Array]:
        parts = simulation.parts._replace(controller=make(V))

        def one(state: FedState, number: Array) -> tuple[FedState, tuple[Array, Array]]:
            keys = round_keys(state.key, number)
            link = parts.link.step(state.link, keys.channel, jnp.arange(world.data.count.shape[0]))
            state = dataclasses.replace(state, link=link)
            cohort = choose_cohort(parts, world, state, keys)
            here, weight = cohort.present, parts.client_weight(cohort.clients.examples)
            untrained = Local(
                trained=cast(Trained, None), shown=cast(Adapters, None), finite=here, active=here, weight=weight
            )
            decision = control(parts, state, cohort, untrained, tails)

            def bits_of(keep_ratio: Array, ranks: Array) -> Array:
                return parts.sparsifier.payload_bits(keep_ratio, cohort.scope(ranks))

            bits = jax.vmap(bits_of)(decision.keep_ratio, cohort.ranks) * here
            delivery = parts.link.deliver(cohort.link, cohort.samples, bits, decision, cohort.start_s, here)
            latency_s = round_latency(delivery, here)
            state = dataclasses.replace(state, queue_s=parts.controller.update_queue(state.queue_s, latency_s))
            return state, (latency_s, jnp.sum(jnp.where(jnp.isfinite(delivery.latency_s), bits, 0.0)))

        start = dataclasses.replace(state, key=key, queue_s=queue_s)
        return lax.scan(one, start, jnp.arange(rounds))[1]

    every = jax.jit(jax.vmap(jax.vmap(run, (None, None, None, 0, 0, None)), (None, None, 0, None, None, None)))
    given = simulation.world, state, keys, numbers.V, numbers.queue_s, tails
    latency_s, bits = every(*jax.device_put(given, jax.devices()[0]))  # else each device does the same
    return np.asarray(latency_s, np.float64), np.asarray(bits, np.float64)
