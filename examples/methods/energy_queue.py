"""A controller with a queue of its own: what the clients have spent beyond an energy budget.

    fedjax-lora run CONFIG --methods examples/methods/energy_queue.py --set control=energy_queue control.budget_j=0.5

The longer the queue, the fewer ranks are kept, and the more the cohort leans to clients that are heard well. A run's
`metrics.jsonl` holds the queue as `control/owed_j`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.control import common
from fedjax_lora.core.keys import client_keys
from fedjax_lora.methods import Context, Controller, Decision, Method, Observation, Options, Outcome, Population, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyQueueConfig(Options):
    """Fewer ranks where energy is owed.

    budget_j: mean energy of a client in a round that is free.
    haste: how fast the queue, in budgets, brings the kept ranks down.
    """

    name: Literal["energy_queue"] = "energy_queue"
    budget_j: float = traced(1.0)
    haste: float = traced(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget_j < math.inf:
            raise ValueError(f"budget_j must be positive and finite, got {self.budget_j!r}")
        if not 0 <= self.haste < math.inf:
            raise ValueError(f"haste must be at least 0 and finite, got {self.haste!r}")


def make(options: EnergyQueueConfig, context: Context) -> Controller:
    """Kept ranks `r / (1 + haste * queue / budget)`, at least 1, and shares of the band of least latency."""

    def urgency(queues: dict[str, Array]) -> Array:
        return options.haste * queues["energy_j_queue"] / options.budget_j

    def schedule(queues: dict[str, Array], key: Array, clients: Population) -> tuple[Array, dict[str, Array]]:
        # Gumbel noise makes the highest priorities a sample: uniform while the queue is empty.
        noise, snr_hz = jax.vmap(jax.random.gumbel)(client_keys(key, clients.ids)), clients.radio.snr_hz
        lean = jnp.minimum(urgency(queues), 1.0) * jnp.log(jnp.where(snr_hz > 0, snr_hz, 1.0))
        return jnp.where(snr_hz > 0, noise + lean, -jnp.inf), queues

    def allocate(queues: dict[str, Array], seen: Observation) -> Decision:
        kept = jnp.maximum(seen.rank / (1.0 + urgency(queues)), jnp.minimum(seen.rank, 1.0))
        plan = common.least_latency(seen, common.bits_at(seen, kept))
        return Decision(kept, plan.bandwidth_hz, plan.latency_s)

    def update(queues: dict[str, Array], outcome: Outcome) -> tuple[dict[str, Array], dict[str, Array]]:
        owed_j = common.lengthen(queues["energy_j_queue"], outcome.energy_j, options.budget_j)
        return {"energy_j_queue": owed_j}, {"owed_j": owed_j}

    return Controller(allocate, lambda: {"energy_j_queue": jnp.zeros(())}, update, schedule)


METHOD = Method("control", "energy_queue", EnergyQueueConfig, make)
