"""Who can be heard, and what each client would take with the whole cell for itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.parts import MakeParts, World
from fedjax_lora.sim.selection import draw_channel, population
from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import uplink_rate

ROUNDS = 32
"""First rounds whose channels are looked at."""


class Alone(NamedTuple):
    """`[ROUNDS, K]` seconds and joules of each client alone on the whole band; inf where it cannot be heard."""

    seconds: Array
    joules: Array


def alone(make_parts: MakeParts, world: World, state: FedState) -> Alone:
    """What each client takes in the first rounds, if it sends one rank of its update and its steps do not overlap."""
    parts = make_parts(state.numbers)

    def step(state: FedState, number: Array) -> tuple[FedState, Alone]:
        keys = round_keys(state.key, number)
        state = draw_channel(parts, state, keys.channel)
        clients = population(parts, world, state, keys)
        radio, nothing = clients.radio, jnp.zeros_like(clients.radio.start_s)
        upload_s = transfer_time_s(clients.bits[:, 1], uplink_rate(radio.band_hz, radio.snr_hz))
        seconds = radio.start_s + upload_s + (nothing if radio.shared_s is None else radio.shared_s)
        joules = radio.power_w * upload_s + (nothing if radio.compute_j is None else radio.compute_j)
        heard = radio.snr_hz > 0
        return state, Alone(jnp.where(heard, seconds, jnp.inf), jnp.where(heard, joules, jnp.inf))

    return lax.scan(step, state, jnp.arange(ROUNDS))[1]


def reach_notes(simulation: Simulation, state: FedState, control: Any) -> list[str]:
    """One line on clients that are never heard, and on each budget that no client alone would keep in any round.

    These are no mistakes by themselves: a round without anybody takes nothing of a budget.

    Args:
      simulation, state: before round 1.
      control: options of the controller.
    """
    found = jax.jit(alone, static_argnums=0)(simulation.make_parts, simulation.world, state)
    seconds, joules = np.asarray(found.seconds), np.asarray(found.joules)
    silent, notes = np.flatnonzero(np.isinf(seconds).all(0)), []
    if silent.size:
        listed = ", ".join(map(str, silent[:10])) + (", ..." if silent.size > 10 else "")
        notes.append(f"{silent.size} of {seconds.shape[1]} clients cannot be heard in any of {ROUNDS} rounds: {listed}")
    overlap = simulation.make_parts(simulation.numbers).trainer.overlapping > 1
    least = {"energy_budget_j": joules.min()} | ({} if overlap else {"latency_budget_s": seconds.min()})
    for name, needed in least.items():
        budget = getattr(control, name, None)
        if budget is not None and np.isfinite(needed) and budget < needed:
            unit = name[-1]
            notes.append(
                f"control.{name} = {budget:g} is below {needed:.4g} {unit}, the least that a client alone on the whole "
                f"band would take in {ROUNDS} rounds"
            )
    return notes
