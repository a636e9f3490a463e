"""The network and its control alone: rounds of a simulation in which nothing is trained.

What the clients would send is known from shapes: the bits of each number of ranks are those that the sparsifier offers.
What a rank is worth is not, without training: here every rank of a client is worth the same, so that the tail energy of
k of r ranks is 1 - k / r. The label is ours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.control.common import bits_at
from fedjax_lora.core import trees
from fedjax_lora.core.network import Decision, Observation, Outcome
from fedjax_lora.core.types import FedState, Scope
from fedjax_lora.sim.cohort import TRIALS, device_mesh
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.network import ChannelDraws, Played, delivered, draw_channel, play
from fedjax_lora.sim.parts import MakeParts, Parts, World
from fedjax_lora.sim.selection import normalised, offered_bits
from fedjax_lora.sim.trials import Trial
from fedjax_lora.sparsifiers import payload

AT_ONCE = 64
"""Trials at once: what all rounds of them draw is held."""


class NetworkRounds(NamedTuple):
    """Rounds of a network without training; leaves are `[rounds]`, with axes of trials before it in a sweep.

    latency_s: seconds until the last upload ended. energy_j: of the whole cohort.
    uplink_bits: float32, of those who could send. kept_ranks: mean of the cohort. heard: uploads that arrived.
    report: what the controller tells, such as `queue_s`.
    """

    latency_s: Array
    energy_j: Array
    uplink_bits: Array
    kept_ranks: Array
    heard: Array
    report: dict[str, Array]


def network_alone(make_parts: MakeParts, world: World, state: FedState, rounds: int) -> NetworkRounds:
    """Rounds of the state's network and controller, by the channels and cohorts that a run from it would see.

    Args:
      make_parts: of the simulation.
      world: of it; of the examples only the clients' numbers are used.
      state: before round 1.
      rounds: how many; static.
    """
    parts = make_parts(state.numbers)
    ranks, bits = state.clients.rank, offered_bits(parts, state, state.clients.rank)
    client_weights = parts.client_weight(world.data.count)
    downlink = payload.bits(payload.dense_size(state.adapters, _scope(parts, state, parts.rank, "received")), ())
    drawn = draw_channel(
        parts.wireless,
        parts.trainer.work(world.data.count),
        state.methods["wireless"],
        state.key,
        downlink.float32(),
        rounds=rounds,
        cohort_size=parts.layout.cohort_size,
    )

    def observe(drawn: ChannelDraws) -> Observation:
        rank, own_bits, weight = trees.take((ranks, bits, client_weights), drawn.ids)
        tail = jnp.clip(1.0 - jnp.arange(bits.shape[-1]) / rank[:, None], 0.0)
        weights = normalised(weight * drawn.present)
        return Observation(drawn.radio, weights, rank, tail, own_bits, parts.sparsifier.whole_ranks)

    def sent(drawn: ChannelDraws, decision: Decision) -> Array:
        return bits_at(observe(drawn), decision.kept) * drawn.present

    def outcome(drawn: ChannelDraws, decision: Decision) -> Outcome:
        return delivered(parts.wireless, drawn, sent(drawn, decision), decision)[1]

    def keep(drawn: ChannelDraws, played: Played) -> NetworkRounds:
        own = sent(drawn, played.decision)
        delivery, came_to = delivered(parts.wireless, drawn, own, played.decision)
        return NetworkRounds(
            latency_s=came_to.latency_s,
            energy_j=jnp.sum(delivery.energy_j),
            uplink_bits=jnp.sum(jnp.where(jnp.isfinite(delivery.latency_s), own, 0.0)),
            kept_ranks=jnp.sum(played.decision.kept * drawn.present) / jnp.maximum(jnp.sum(drawn.present), 1),
            heard=jnp.sum(delivery.delivered),
            report=played.report,
        )

    return play(parts.controller, state.methods["control"], drawn, observe, outcome, keep)[1]


def _scope(parts: Parts, state: FedState, rank: Array, what: str) -> Scope:
    traffic = parts.aggregator.traffic(state.round, parts.layout.everyone)
    return parts.scope_on_air(rank_mask(rank, max_rank(state.adapters)), getattr(traffic, what))


def run_alone(simulation: Simulation, trials: Sequence[Trial], rounds: int) -> NetworkRounds:
    """`network_alone` of trials of one structure in one program: leaves `[trials, rounds]`, on the host.

    The devices share the trials, AT_ONCE of them at a time.
    """
    devices = jax.device_count()
    lanes = -(-min(len(trials), AT_ONCE) // devices) * devices
    run = trials_alone(simulation, rounds)
    found = []
    for start in range(0, len(trials), lanes):
        batch = list(trials[start : start + lanes])
        batch += batch[-1:] * (lanes - len(batch))
        found.append(jax.device_get(run(*arguments(simulation, batch))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(trials)], *found)


def trials_alone(simulation: Simulation, rounds: int) -> Any:
    """`network_alone` of many trials as one jitted program of `arguments`, shared by the devices."""
    program = simulation.program

    def one(world: World, trial: Trial, key: Array) -> NetworkRounds:
        data = dataclasses.replace(world.data, index=trial.rows, count=trial.examples)
        state = program.start(key, trial.numbers)
        return network_alone(program.make_parts, dataclasses.replace(world, data=data), state, rounds)

    every, mesh = jax.vmap(one, in_axes=(None, 0, 0)), device_mesh(jax.device_count())
    specs = (P(), P(TRIALS), P(TRIALS))
    return jax.jit(jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=P(TRIALS), check_vma=False))


def arguments(simulation: Simulation, trials: Sequence[Trial]) -> tuple[World, Trial, Array]:
    """What the program of `trials_alone` takes of so many trials, a multiple of the devices."""
    keys = jnp.stack([jax.random.key(trial.seed) for trial in trials])
    return simulation.world, trees.stack(list(trials)), keys
