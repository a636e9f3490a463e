"""Who can be heard, and how long each client would take with the whole cell for itself."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.parts import MakeParts, World
from fedjax_lora.sim.round import draw_channel
from fedjax_lora.sim.selection import population
from fedjax_lora.wireless.latency import transfer_time_s
from fedjax_lora.wireless.rate import uplink_rate

ROUNDS = 32
"""First rounds whose channels are looked at."""


def alone_s(make_parts: MakeParts, world: World, state: FedState) -> Array:
    """`[ROUNDS, K]` seconds of each client that keeps one rank, on the whole band; inf where it cannot be heard."""
    parts = make_parts(state.numbers)

    def step(state: FedState, number: Array) -> tuple[FedState, Array]:
        keys = round_keys(state.key, number)
        state = draw_channel(parts, state, keys.channel)
        clients = population(parts, world, state, keys)
        radio, bits = clients.radio, clients.bits[:, 1]
        shared_s = jnp.zeros_like(radio.start_s) if radio.shared_s is None else radio.shared_s
        upload_s = transfer_time_s(bits, uplink_rate(radio.band_hz, radio.snr_hz))
        return state, jnp.where(radio.snr_hz > 0, radio.start_s + shared_s + upload_s, jnp.inf)

    return lax.scan(step, state, jnp.arange(ROUNDS))[1]


def reach_notes(simulation: Simulation, state: FedState, budget_s: float | None) -> list[str]:
    """One line on clients that are never heard, and one on a budget that even the quickest client alone exceeds.

    Both are no mistakes by themselves: rounds without such a client, or without anybody, are short.
    """
    seconds = np.asarray(jax.jit(alone_s, static_argnums=0)(simulation.make_parts, simulation.world, state))
    silent, notes = np.flatnonzero(np.isinf(seconds).all(0)), []
    if silent.size:
        listed = ", ".join(map(str, silent[:10])) + (", ..." if silent.size > 10 else "")
        notes.append(f"{silent.size} of {seconds.shape[1]} clients cannot be heard in any of {ROUNDS} rounds: {listed}")
    if budget_s is not None and budget_s < seconds.min():
        notes.append(
            f"control.latency_budget_s = {budget_s:g} is below {seconds.min():.4g} s, what the quickest client takes "
            f"alone on the whole band in the best of {ROUNDS} rounds: most rounds will have nobody"
        )
    return notes
