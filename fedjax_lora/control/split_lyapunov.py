"""Lyapunov scheduling of split training: who takes part in a round, and on which part of the band.

The server minimises `queue cost(S) - V gamma_t sum of the gains of S` over the set S of devices and their shares
of the band, where the cost is the latency of the round or the energy of its devices, and the virtual queue counts what
it exceeded its budget by in the rounds so far. The split of a long-term problem into rounds, and that rounds weigh
differently, are of arXiv 2407.02924; the terms, the weights over rounds and the solvers are our own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.control import common
from fedjax_lora.control.solver import device_energy, device_sets
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Decision, Observation, Outcome, Population
from fedjax_lora.core.numbers import traced

OverRounds = Literal["constant", "linear", "geometric"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitLyapunovConfig(common.CommonRatio):
    """Devices by price and gain; every default is our choice.

    V: weight of participation against the queue, in s^2, or in J^2 where the budget is one of energy. Larger: more
      devices, a longer queue.
    latency_budget_s: what the latency of a round may be on average over the run; None where energy has a budget.
    energy_budget_j: what all devices of a round together may spend on average over the run, on computing too, instead
      of a budget of latency. The set is then found by a heuristic, on shares of the band of least energy.
    queue_s: the queue before round 1. With 0 all who can be heard take part in the first round, as far as
      `clients.per_round` allows.
    devices: whether all devices count `alike` (the set of a latency is then optimal), or by their `examples` as
      `clients.weighting` has it (then it is nearly so).
    over_rounds: how much the devices of a round count, with mean 1 over the run: the same, in proportion to the number
      of the round, or growing by the factor `growth` from each round to the next.
    growth: of `geometric`; below 1 early rounds count more.
    """

    name: Literal["split_lyapunov"] = "split_lyapunov"
    V: float = traced(10.0)
    latency_budget_s: float | None = traced(2.0)
    energy_budget_j: float | None = traced(None)
    queue_s: float = traced(0.0)
    devices: Literal["alike", "examples"] = "alike"
    over_rounds: OverRounds = "constant"
    growth: float = traced(1.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("V", "queue_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)!r}")
        for name in ("latency_budget_s", "energy_budget_j"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if (self.latency_budget_s is None) == (self.energy_budget_j is None):
            raise ValueError(
                f"latency_budget_s must be null just where energy_budget_j is given, got {self.latency_budget_s!r} "
                f"and {self.energy_budget_j!r}"
            )
        if self.energy_budget_j is not None and self.queue_s:
            raise ValueError(f"queue_s must be 0 where energy_budget_j is given, got {self.queue_s!r}")
        if not 0.5 <= self.growth <= 2:
            raise ValueError(f"growth must be between 0.5 and 2, got {self.growth!r}")


class _Constraint(NamedTuple):
    """What has a budget.

    queue: its name. first: its length before round 1. budget: of a round.
    choose: `(Population, price, gains [K], most) -> [K]` bool, who takes part.
    share: `(Observation, bits [C]) -> (share_hz [C], latency_s)` of those who do.
    spent: `(Outcome, number of devices) -> ` what a round took of the budget.
    """

    queue: str
    first: ArrayLike
    budget: ArrayLike
    choose: Callable[[Population, Array, Array, int], Array]
    share: Callable[[Observation, Array], tuple[Array, Array]]
    spent: Callable[[Outcome, Array], Array]


def make(options: SplitLyapunovConfig, context: Context) -> Controller:
    """The schedule of a round, shares of the band for it, and the queue.

    Reports `round_weight`, gamma_t, and `absence`, what the round adds to the bound for the devices that it leaves out:
    gamma_t times the square of their weight, see docs/split.md.
    """
    rounds, most = context.rounds, context.cohort_size
    constraint = _of_latency(options) if options.energy_budget_j is None else _of_energy(options)
    queue = constraint.queue

    def schedule(queues: common.Queues, key: Array, clients: Population) -> tuple[Array, common.Queues]:
        del key
        gain = options.V * round_weights(options, rounds)[queues["round"].astype(jnp.int32)]
        gains = gain * (1.0 / clients.ids.size if options.devices == "alike" else clients.weights)
        mask = constraint.choose(clients, queues[queue], jnp.broadcast_to(gains, clients.ids.shape), most)
        absent = 1.0 - jnp.sum(jnp.where(mask, clients.weights, 0.0))
        number = jnp.sum(mask).astype(jnp.float32)
        return jnp.where(mask, 0.0, -jnp.inf), queues | {"absent": absent, "number": number}

    def allocate(queues: common.Queues, observation: Observation) -> Decision:
        kept = common.common_kept(options.keep_ratio, observation)
        return Decision(kept, *constraint.share(observation, common.bits_at(observation, kept)))

    def init() -> common.Queues:
        first = {name: jnp.zeros(()) for name in ("round", "absent", "number")}
        return {queue: jnp.asarray(constraint.first, jnp.float32)} | first

    def update(queues: common.Queues, outcome: Outcome) -> tuple[common.Queues, common.Queues]:
        spent = constraint.spent(outcome, queues["number"])
        length = common.lengthen(queues[queue], spent, constraint.budget)
        gamma = round_weights(options, rounds)[queues["round"].astype(jnp.int32)]
        report = {queue: length, "round_weight": gamma, "absence": gamma * queues["absent"] ** 2}
        return queues | {queue: length, "round": queues["round"] + 1}, report

    return Controller(allocate, init, update, schedule)


def _of_latency(options: SplitLyapunovConfig) -> _Constraint:
    assert options.latency_budget_s is not None  # __post_init__ has seen to it

    def choose(clients: Population, price: Array, gains: Array, most: int) -> Array:
        demand, band_hz = common.demand_of(clients, options.keep_ratio), clients.radio.band_hz
        if options.devices == "alike":
            return device_sets.best_equal(demand, band_hz, price, gains[0], most).mask
        return device_sets.best_weighted(demand, band_hz, price, gains, most).mask

    def share(observation: Observation, bits: Array) -> tuple[Array, Array]:
        plan = common.least_latency(observation, bits)
        return plan.bandwidth_hz, plan.latency_s

    def spent(outcome: Outcome, number: Array) -> Array:
        del number
        return outcome.latency_s

    return _Constraint("queue_s", options.queue_s, options.latency_budget_s, choose, share, spent)


def _of_energy(options: SplitLyapunovConfig) -> _Constraint:
    assert options.energy_budget_j is not None  # `make` has seen to it

    def costs(of: Population | Observation, bits: Array, able: Array) -> device_energy.Costs:
        if of.radio.compute_j is None:
            raise ValueError("wireless must give Radio.compute_j where energy has a budget, got None")
        return device_energy.Costs(of.radio.compute_j, bits, of.radio.snr_hz, able)

    def choose(clients: Population, price: Array, gains: Array, most: int) -> Array:
        bits = common.bits_at(clients, common.common_kept(options.keep_ratio, clients))
        own, radio = costs(clients, bits, clients.radio.snr_hz > 0), clients.radio
        return device_energy.best_by_energy(own, radio.band_hz, radio.power_w, price, gains, most).mask

    def share(observation: Observation, bits: Array) -> tuple[Array, Array]:
        here, radio = observation.weights > 0, observation.radio
        share_hz = device_energy.least_energy(costs(observation, bits, here), here, radio.band_hz, radio.power_w)[1]
        return share_hz, jnp.float32(jnp.nan)

    def spent(outcome: Outcome, number: Array) -> Array:
        return outcome.energy_j * number

    return _Constraint("energy_queue_j", 0.0, options.energy_budget_j, choose, share, spent)


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
    needs=frozenset({"side_by_side", "in_step"}),
    breaks=frozenset({"full_participation"}),
)
