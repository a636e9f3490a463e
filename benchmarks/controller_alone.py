"""TSFA on the channel of a run without training, by what the ranks were worth to one cohort.

`fedjax_lora.sim.alone` plays a run's own network with ranks of equal worth. A start of the queue is fitted to more: the
worth of the ranks after some training, and draws of the channel that the run does not see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora import Simulation
from fedjax_lora.control.common import bits_at
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.network import Decision, Observation, Outcome
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.network import ChannelDraws, delivered, draw_channel, play
from fedjax_lora.sim.parts import Offers, World
from fedjax_lora.sim.round import importance, train_locally
from fedjax_lora.sim.selection import choose_cohort, normalised


class Numbers(NamedTuple):
    """Of controllers `[S]`: V, in s^2 over the unit of the tail, and the first queue, in s."""

    V: Array
    queue_s: Array


def offers_of(simulation: Simulation, state: FedState) -> Offers:
    """Tail energies and bits `[C, R + 1]` of the cohort of the next round after its local training."""

    @jax.jit
    def train(world: World, state: FedState) -> Offers:
        parts, keys = simulation.make_parts(state.numbers), round_keys(state.key, state.round)
        cohort = choose_cohort(parts, world, state, keys)
        return importance(parts, cohort, train_locally(parts, world, state, cohort))

    return train(simulation.world, state)


def latency_alone(
    simulation: Simulation, state: FedState, keys: Array, numbers: Numbers, offers: Offers, rounds: int
) -> np.ndarray:
    """Latency `[P, S, rounds]` by the fading and cohorts of keys `[P]`, for numbers `[S]`.

    Nothing is trained: what is offered `[C, R + 1]` stays, and all that is offered at the kept ranks is sent. The
    broadcast takes no time.
    """
    size, free = offers.bits.shape[0], jnp.zeros(())

    def run(world: World, state: FedState, key: Array, numbers: Numbers) -> Array:
        named = {"control.V": numbers.V, "control.queue_s": numbers.queue_s}
        parts = simulation.make_parts({**state.numbers, **named})
        work, cell, cohort = parts.trainer.work(world.data.count), state.methods["wireless"], parts.layout.cohort_size
        drawn = draw_channel(parts.wireless, work, cell, key, free, rounds=rounds, cohort_size=cohort, size=size)

        def observe(drawn: ChannelDraws) -> Observation:
            weights = normalised(parts.client_weight(world.data.count[drawn.ids]) * drawn.present)
            ranks, whole = jnp.broadcast_to(parts.rank, size), parts.sparsifier.whole_ranks
            return Observation(drawn.radio, weights, ranks, offers.tail_energy, offers.bits, whole)

        def outcome(drawn: ChannelDraws, decision: Decision) -> Outcome:
            sent = bits_at(observe(drawn), decision.kept) * drawn.present
            return delivered(parts.wireless, drawn, sent, decision)[1]

        return play(parts.controller, parts.controller.init(), drawn, observe, outcome)[1].outcome.latency_s

    every = jax.jit(jax.vmap(jax.vmap(run, (None, None, None, 0)), (None, None, 0, None)))
    given = simulation.world, state, keys, numbers
    return np.asarray(every(*jax.device_put(given, jax.devices()[0])), np.float64)  # else each device does the same
