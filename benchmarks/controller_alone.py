"""Controllers on the channel of a run without training, by what the ranks were worth to one cohort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora import Simulation
from fedjax_lora.control import common
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.network import Decision, Observation, Outcome
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.network import ChannelDraws, Played, delivered, draw_channel, play
from fedjax_lora.sim.parts import Offers, World
from fedjax_lora.sim.round import choose_cohort, importance, normalised, train_locally


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


def alone(
    simulation: Simulation, state: FedState, keys: Array, numbers: Numbers | None, offers: Offers, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latency and sent bits `[P, S, rounds]` by the fading and cohorts of keys `[P]`, for numbers `[S]`.

    Nothing is trained: what is offered `[C, R + 1]` stays, and all that is offered at the kept ranks is sent. The
    broadcast takes no time. Without numbers the controller is the simulation's own, and S is 1.
    """
    layout, size = simulation.layout, offers.bits.shape[0]

    def run(world: World, state: FedState, key: Array, numbers: dict[str, Array]) -> tuple[Array, Array]:
        parts = simulation.make_parts({**state.numbers, **numbers})
        drawn = draw_channel(
            parts.wireless,
            parts.trainer.work(world.data.count),
            state.methods["wireless"],
            key,
            jnp.zeros(()),
            rounds=rounds,
            cohort_size=layout.cohort_size,
            size=size,
        )

        def observe(drawn: ChannelDraws) -> Observation:
            return Observation(
                radio=drawn.radio,
                weights=normalised(parts.client_weight(world.data.count[drawn.ids]) * drawn.present),
                rank=jnp.broadcast_to(parts.rank, size),
                tail_energy=offers.tail_energy,
                bits=offers.bits,
                whole_ranks=parts.sparsifier.whole_ranks,
            )

        def sent(drawn: ChannelDraws, decision: Decision) -> Array:
            return common.bits_at(observe(drawn), decision.kept) * drawn.present

        def outcome(drawn: ChannelDraws, decision: Decision) -> Outcome:
            return delivered(parts.wireless, drawn, sent(drawn, decision), decision)[1]

        def keep(drawn: ChannelDraws, played: Played) -> tuple[Array, Array]:
            bits = sent(drawn, played.decision)
            delivery, _ = delivered(parts.wireless, drawn, bits, played.decision)
            return played.outcome.latency_s, jnp.sum(jnp.where(jnp.isfinite(delivery.latency_s), bits, 0.0))

        return play(parts.controller, parts.controller.init(), drawn, observe, outcome, keep)[1]

    named = {} if numbers is None else {"control.V": numbers.V, "control.queue_s": numbers.queue_s}
    over_numbers = jax.vmap(run, (None, None, None, 0), axis_size=1 if numbers is None else None)
    every = jax.jit(jax.vmap(over_numbers, (None, None, 0, None)))
    given = simulation.world, state, keys, named
    latency_s, bits = every(*jax.device_put(given, jax.devices()[0]))  # else each device does the same
    return np.asarray(latency_s, np.float64), np.asarray(bits, np.float64)
