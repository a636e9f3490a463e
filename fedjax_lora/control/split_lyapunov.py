"""Lyapunov scheduling of split training: who takes part in a round, and on which part of the band.

The server minimises `queue latency(S) - V gamma_t sum of the gains of S` over the set S of devices and their shares
of the band, where the virtual queue counts what the latency of the rounds so far exceeds its budget. The split of a
long-term problem into rounds, and that rounds weigh differently, are of arXiv 2407.02924; the terms, the weights over
rounds and the solver are our own.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.control import common
from fedjax_lora.control.solver import device_sets
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Decision, Observation, Outcome, Population
from fedjax_lora.core.numbers import traced

OverRounds = Literal["constant", "linear", "geometric"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitLyapunovConfig(common.CommonRatio):
    """Devices by price and gain; every default is our choice.

    V: weight of participation against the queue, in s^2. Larger: more devices, a longer queue.
    latency_budget_s: what the latency of a round may be on average over the run.
    queue_s: the queue before round 1. With 0 all who can be heard take part in the first round, as far as
      `clients.per_round` allows.
    devices: whether all devices count `alike` (the set is then optimal), or by their `examples` as
      `clients.weighting` has it (then it is nearly so).
    over_rounds: how much the devices of a round count, with mean 1 over the run: the same, in proportion to the number
      of the round, or growing by the factor `growth` from each round to the next.
    growth: of `geometric`; below 1 early rounds count more.
    """

    name: Literal["split_lyapunov"] = "split_lyapunov"
    V: float = traced(10.0)
    latency_budget_s: float = traced(2.0)
    queue_s: float = traced(0.0)
    devices: Literal["alike", "examples"] = "alike"
    over_rounds: OverRounds = "constant"
    growth: float = traced(1.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("V", "queue_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)!r}")
        if not 0 < self.latency_budget_s < math.inf:
            raise ValueError(f"latency_budget_s must be positive and finite, got {self.latency_budget_s!r}")
        if not 0.5 <= self.growth <= 2:
            raise ValueError(f"growth must be between 0.5 and 2, got {self.growth!r}")


def make(options: SplitLyapunovConfig, context: Context) -> Controller:
    """The schedule of a round, shares of least latency for it, and the queue.

    Reports `round_weight`, gamma_t, and `absence`, what the round adds to the bound for the devices that it leaves out:
    gamma_t times the square of their weight, see docs/split.md.
    """
    rounds, most = context.rounds, context.cohort_size

    def schedule(queues: common.Queues, key: Array, clients: Population) -> tuple[Array, common.Queues]:
        del key
        demand, band_hz, price = common.demand_of(clients, options.keep_ratio), clients.radio.band_hz, queues["queue_s"]
        gain = options.V * round_weights(options, rounds)[queues["round"].astype(jnp.int32)]
        if options.devices == "alike":
            found = device_sets.best_equal(demand, band_hz, price, gain / clients.ids.size, most)
        else:
            found = device_sets.best_weighted(demand, band_hz, price, gain * clients.weights, most)
        absent = 1.0 - jnp.sum(jnp.where(found.mask, clients.weights, 0.0))
        return jnp.where(found.mask, 0.0, -jnp.inf), queues | {"absent": absent}

    def allocate(queues: common.Queues, observation: Observation) -> Decision:
        kept = common.common_kept(options.keep_ratio, observation)
        plan = common.least_latency(observation, common.bits_at(observation, kept))
        return Decision(kept, plan.bandwidth_hz, plan.latency_s)

    def init() -> common.Queues:
        return {"queue_s": jnp.asarray(options.queue_s, jnp.float32), "round": jnp.zeros(()), "absent": jnp.zeros(())}

    def update(queues: common.Queues, outcome: Outcome) -> tuple[common.Queues, common.Queues]:
        queue_s = common.lengthen(queues["queue_s"], outcome.latency_s, options.latency_budget_s)
        gamma = round_weights(options, rounds)[queues["round"].astype(jnp.int32)]
        report = {"queue_s": queue_s, "round_weight": gamma, "absence": gamma * queues["absent"] ** 2}
        return queues | {"queue_s": queue_s, "round": queues["round"] + 1}, report

    return Controller(allocate, init, update, schedule)


def round_weights(options: SplitLyapunovConfig, rounds: int) -> Array:
    """`[T]` gamma_t of the rounds, of mean 1."""
    number = jnp.arange(rounds, dtype=jnp.float32)
    if options.over_rounds == "constant":
        return jnp.ones(rounds)
    if options.over_rounds == "linear":
        return 2.0 * (number + 1.0) / (rounds + 1.0)
    # Relative to the largest, so that no power leaves the range of float32.
    exponent = (number - jnp.where(options.growth > 1, rounds - 1.0, 0.0)) * jnp.log(options.growth)
    relative = jnp.exp(exponent)
    return relative / jnp.mean(relative)


METHOD = Method(
    "control",
    "split_lyapunov",
    SplitLyapunovConfig,
    make,
    needs=frozenset({"side_by_side"}),
    breaks=frozenset({"full_participation"}),
)
