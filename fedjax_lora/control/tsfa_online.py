"""TSFA online: keep ratio and bandwidth of every round, under long-term constraints of latency and of energy.

Lyapunov optimisation as in B. Kim, W. Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal
Updates", arXiv 2505.00333; the exact terms of the objective and the solver are our own. See docs/tsfa.md.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from fedjax_lora.control import common
from fedjax_lora.control.solver.best_response import Problem
from fedjax_lora.control.solver.common_ratio import common_share
from fedjax_lora.control.solver.shares import MOST_WORTH, sent_share
from fedjax_lora.core import network
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller, Observation, Outcome
from fedjax_lora.core.numbers import traced
from fedjax_lora.wireless.allocation import min_max_latency

Tail = Literal["relative", "energy", "linear"]
Ratio = Literal["client", "common"]

_NEVER_S = 1e15  # as `min_max_latency` has it
_LONGEST_QUEUE = 1e5  # budgets
_ROUNDING = 1e-5  # so that float32's k - 1e-6 ranks are k


@dataclasses.dataclass(frozen=True, kw_only=True)
class TsfaConfig(common.Budgeted):
    """TSFA online; defaults and options are our choice.

    V: weight of what is not sent against the queue, in s^2 over the unit of the tail. Larger: better updates, a
      longer queue.
    latency_budget_s: what the latency of a round may be on average over the run.
    queue_s: the queue before round 1. With 0 the first rounds send the most that they may; the mean latency of T
      rounds exceeds the budget by at most `(Q_T - queue_s) / T`. A plan chooses it, as it does V.
    energy_budget_j: what a client of the cohort may spend in a round on average over the run, on computing too; None
      is no constraint.
    min_keep_ratio, max_keep_ratio: as in `Budgeted`.
    tail: the cost of a keep ratio: the client's tail energy `relative` to the cohort's weighted mean of the whole
      energy, so that V is in s^2 for every sparsifier and in every round; the `energy` itself; or `linear`, 1 - ratio.
    ratio: each `client`'s own, or a `common` one.
    """

    name: Literal["tsfa"] = "tsfa"
    V: float = traced(10.0)
    queue_s: float = traced(0.0)
    energy_budget_j: float | None = traced(None)
    tail: Tail = "relative"
    ratio: Ratio = "client"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.V < math.inf:
            raise ValueError(f"V must be at least 0 and finite, got {self.V!r}")
        if not 0 <= self.queue_s <= _LONGEST_QUEUE * self.latency_budget_s:
            longest = f"{_LONGEST_QUEUE:.0e} latency_budget_s, beyond which float32 cannot count rounds"
            raise ValueError(f"queue_s must be in 0 ... {longest}, got {self.queue_s!r}")
        if self.energy_budget_j is not None and not 0 < self.energy_budget_j < math.inf:
            raise ValueError(f"energy_budget_j must be positive and finite, or null, got {self.energy_budget_j!r}")

    def needs(self) -> dict[str, str]:
        """Tail energies that count all that a client may send, where it goes by them."""
        return {} if self.tail == "linear" else {"whole_tail": "tail"}

    def breaks(self) -> dict[str, str]:
        """With a budget of energy, latency is not all that is constrained."""
        return {} if self.energy_budget_j is None else {"latency_alone": "energy_budget_j"}


class Decision(NamedTuple):
    """What `solve` finds.

    keep_ratio: `[K]` in (0, 1]. bandwidth_hz: `[K]` shares of the band. latency_s: scalar, when all who send end.
    objective: scalar, its least value.
    """

    keep_ratio: Array
    bandwidth_hz: Array
    latency_s: Array
    objective: Array


def solve(
    bits_full: ArrayLike,
    snr_hz: ArrayLike,
    start_s: ArrayLike,
    bandwidth_hz: ArrayLike,
    weights: ArrayLike,
    tail_energy: ArrayLike,
    queue: ArrayLike,
    V: ArrayLike,
    *,
    min_keep_ratio: ArrayLike | None = None,
    max_keep_ratio: ArrayLike | None = None,
    rank: ArrayLike | None = None,
    ratio: Ratio = "client",
) -> Decision:
    """Minimise `V sum_k weights_k tail_k(rho_k) + queue tau` over keep ratios rho, shares b and latency tau.

    Subject to `sum_k b_k <= bandwidth_hz` and `start_k + bits_k(rho_k) / r(b_k) <= tau`. Tail and bits are linear
    between whole ranks. A client of weight 0, without bits, or that cannot send at all is left out: it keeps the most
    that it may, costs nothing and gets no band. With queue 0 all keep the most that they may.

    The tail should be convex in the bits, as sums of sorted energies are: where a rank is worth more a bit than one
    before it, it counts as the earlier one. The ratios have implicit gradients; who keeps whole ranks goes on to. By
    `rank` and the limits of the ratio they hold where these are not whole ranks themselves.

    Args:
      bits_full: `[K]` payload at ratio 1, in proportion to the ratio; or `[K, R + 1]`, the payloads of 0 ... R whole
        ranks, non-decreasing.
      snr_hz: `[K]` received power over noise density p·g/N0, Hz.
      start_s: `[K]` when a client can begin, s.
      bandwidth_hz: scalar, the band, Hz.
      weights: `[K]` of the clients, >= 0.
      tail_energy: `[K, R + 1]` cost of keeping 0 ... R ranks, non-increasing. `[[1, 0]]` for each is `1 - rho`, with a
        `min_keep_ratio` of its own, since one rank is then all.
      queue: scalar, virtual queue of the latency, s.
      V: scalar, weight of the first term.
      min_keep_ratio: scalar or `[K]`, > 0, the least ratio; None is one rank.
      max_keep_ratio: scalar or `[K]`, <= 1, the largest ratio, not below the least; None is 1.
      rank: scalar or `[K]`, how many ranks ratio 1 stands for; None is R. Table entries beyond it are ignored.
      ratio: each `client`'s own, or a `common` one; the latter by a search that is local unless the starts are equal.

    Returns:
      Keep ratios, shares, the latency of those that can send, and the objective.

    Raises:
      ValueError: if the shapes do not fit, or `ratio` is neither.
    """
    bits_full, snr_hz, start_s, bandwidth_hz, weights, tail_energy, queue, V = (
        jnp.asarray(x, jnp.float32) for x in (bits_full, snr_hz, start_s, bandwidth_hz, weights, tail_energy, queue, V)
    )
    _check_shapes(bits_full, snr_hz, start_s, weights, tail_energy)
    clients, max_rank = snr_hz.shape, tail_energy.shape[-1] - 1
    if ratio not in get_args(Ratio):
        raise ValueError(f"ratio must be one of {', '.join(get_args(Ratio))}, got {ratio!r}")
    rank = jnp.broadcast_to(jnp.asarray(max_rank if rank is None else rank, jnp.float32), clients)
    if bits_full.ndim == 1:
        bits_full = bits_full[:, None] * jnp.minimum(jnp.arange(max_rank + 1) / rank[:, None], 1.0)
    least = jnp.clip(1.0 if min_keep_ratio is None else min_keep_ratio * rank, 0.0, rank)
    most = jnp.clip(rank if max_keep_ratio is None else max_keep_ratio * rank, least, rank)
    return _solve(bits_full, snr_hz, start_s, bandwidth_hz, weights, tail_energy, queue, V, least, most, rank, ratio)


@functools.partial(jax.jit, static_argnames="ratio")  # traced once for all programs that use it
def _solve(
    bits_full: Array,
    snr_hz: Array,
    start_s: Array,
    bandwidth_hz: Array,
    weights: Array,
    tail_energy: Array,
    queue: Array,
    V: Array,
    least: Array,
    most: Array,
    rank: Array,
    ratio: Ratio,
) -> Decision:
    """Payloads `[K, R + 1]`; `least`, `most` and `rank` `[K]` in ranks."""
    steps = _steps(bits_full, weights[:, None] * tail_energy, least, most)
    able = _able(steps, snr_hz, start_s, bandwidth_hz, weights)
    problem = _problem(steps, able, _worth(steps, queue, V), snr_hz, start_s, bandwidth_hz)
    share = sent_share(problem) if ratio == "client" else common_share(problem, steps.begin, steps.length, rank)
    sent_bits = problem.least_bits + jnp.sum(share * problem.step_bits, -1)
    allocation = min_max_latency(sent_bits, problem.snr_hz, problem.start_s, problem.band_hz)
    left_out = steps.last_cost + jnp.sum((1.0 - share) * steps.cost, -1)
    return Decision(
        keep_ratio=jnp.minimum(jnp.where(able, least + jnp.sum(share * steps.length, -1), most) / rank, 1.0),
        bandwidth_hz=allocation.bandwidth_hz,
        latency_s=allocation.latency_s,
        objective=V * jnp.sum(jnp.where(able, left_out, 0.0)) + queue * allocation.latency_s,
    )


def _check_shapes(bits_full: Array, snr_hz: Array, start_s: Array, weights: Array, tail_energy: Array) -> None:
    clients, table = snr_hz.shape, tail_energy.shape
    fit = len(clients) == 1 and start_s.shape == weights.shape == clients
    if not (fit and bits_full.shape in (clients, table) and table[:-1] == clients and table[-1] > 1):
        shapes = [x.shape for x in (bits_full, snr_hz, start_s, weights, tail_energy)]
        raise ValueError(
            "snr_hz, start_s and weights must be [K], tail_energy [K, R + 1], and bits_full one of both, got "
            f"bits_full, snr_hz, start_s, weights, tail_energy of {shapes}"
        )


class _Steps(NamedTuple):
    """From the least ratio up, rank by rank: `[K, R]` where a step begins, its length, bits and the cost it saves."""

    begin: Array
    length: Array
    bits: Array
    cost: Array
    least_bits: Array
    last_cost: Array


def _steps(bits: Array, cost: Array, least: Array, most: Array) -> _Steps:
    """Payloads and costs `[K, R + 1]` of whole ranks, cut to what lies between `least` and `most`."""
    ends = jnp.arange(1, bits.shape[-1])
    more_bits, less_cost = (jnp.maximum(jnp.diff(x), 0.0) for x in (bits, -cost))
    begin = jnp.maximum(ends - 1, least[:, None])
    length = jnp.clip(jnp.minimum(ends, most[:, None]) - begin, 0.0, 1.0)
    skipped = jnp.clip(least[:, None] - (ends - 1), 0.0, 1.0)
    beyond = jnp.clip(ends - most[:, None], 0.0, 1.0)
    return _Steps(
        begin=begin,
        length=length,
        bits=length * more_bits,
        cost=length * less_cost,
        least_bits=bits[:, 0] + jnp.sum(skipped * more_bits, -1),
        last_cost=cost[:, -1] + jnp.sum(beyond * less_cost, -1),
    )


def _able(steps: _Steps, snr_hz: Array, start_s: Array, bandwidth_hz: Array, weights: Array) -> Array:
    """`[K]` bool: who has a say, has something to send, and can."""
    total_bits = steps.least_bits + steps.bits.sum(-1)
    can = (total_bits < _NEVER_S * snr_hz) & (start_s < _NEVER_S) & (bandwidth_hz > 0)
    return can & (total_bits > 0) & (weights > 0)


def _worth(steps: _Steps, queue: Array, V: Array) -> Array:
    """`[K, R]` seconds that a bit of each step is worth; no step is worth more than one before it."""
    counts = (steps.bits > 0) & (queue > 0)
    per_bit = V * steps.cost / jnp.where(steps.bits > 0, steps.bits, 1.0) / jnp.where(queue > 0, queue, 1.0)
    return lax.cummin(jnp.where(counts, jnp.minimum(per_bit, MOST_WORTH), MOST_WORTH), axis=1)


def _problem(steps: _Steps, able: Array, worth: Array, snr_hz: Array, start_s: Array, band_hz: Array) -> Problem:
    """What is there to send, with harmless values for who is left out."""
    return Problem(
        least_bits=jnp.where(able, steps.least_bits, 0.0),
        step_bits=jnp.where(able[:, None], steps.bits, 0.0),
        worth=worth,
        snr_hz=jnp.where(able, snr_hz, 1.0),
        start_s=jnp.where(able, start_s, 0.0),
        band_hz=jnp.where(band_hz > 0, band_hz, 1.0),
    )


def left_out(tail: Tail, observation: Observation) -> Array:
    """`[C, R + 1]` what it costs that 0 ... R ranks are kept, see `TsfaConfig.tail`."""
    energy = observation.tail_energy
    if tail == "linear":
        return common.linear_tail(observation.rank, energy.shape[-1] - 1)
    return common.relative_tail(energy, observation.weights) if tail == "relative" else energy


def make(options: TsfaConfig, context: Context | None = None) -> Controller:
    """Solves, rounds ratios down to whole ranks, and shares the band anew: the latency never exceeds the plan's.

    Latency and objective of its decisions are those after rounding. All who send end together, so that the energy of
    the uploads is affine in the latency: the energy constraint adds to the price of time alone, and the objective
    leaves out what no decision changes.
    """
    del context

    def allocate(queues: common.Queues, observation: Observation) -> network.Decision:
        rank, weights, bits = observation.rank, observation.weights, observation.bits
        tail, price_s = left_out(options.tail, observation), price_of_time(options, queues, observation)
        least, most = common.rank_limits(options.min_keep_ratio, options.max_keep_ratio, rank)
        planned = solve(
            bits,
            observation.radio.snr_hz,
            observation.radio.start_s,
            observation.radio.band_hz,
            weights,
            tail,
            price_s,
            options.V,
            min_keep_ratio=least / rank,
            max_keep_ratio=most / rank,
            rank=rank,
            ratio=options.ratio,
        )
        kept = jnp.clip(jnp.floor(planned.keep_ratio * rank + _ROUNDING), least, most)
        allocation = common.least_latency(observation, common.at_rank(bits, kept))
        lost = jnp.where(allocation.bandwidth_hz > 0, weights * common.at_rank(tail, kept), 0.0)
        objective = options.V * lost.sum() + price_s * allocation.latency_s
        return network.Decision(kept, allocation.bandwidth_hz, allocation.latency_s, objective)

    return Controller(allocate, lambda: first_queues(options), lambda queues, outcome: step(options, queues, outcome))


def first_queues(options: TsfaConfig) -> common.Queues:
    """Before round 1."""
    queues = {"queue_s": jnp.asarray(options.queue_s, jnp.float32)}
    return queues if options.energy_budget_j is None else queues | {"energy_queue_j": jnp.zeros(())}


def step(options: TsfaConfig, queues: common.Queues, outcome: Outcome) -> tuple[common.Queues, common.Queues]:
    """The queues after a round, as state and as report."""
    after = {"queue_s": common.lengthen(queues["queue_s"], outcome.latency_s, options.latency_budget_s)}
    if options.energy_budget_j is not None:
        energy_queue_j = common.lengthen(queues["energy_queue_j"], outcome.energy_j, options.energy_budget_j)
        after["energy_queue_j"] = energy_queue_j
    return after, after


def price_of_time(options: TsfaConfig, queues: common.Queues, observation: Observation) -> Array:
    """Scalar, s: the queue of the latency, and what the energy constraint adds to it.

    The mean energy of the uploads is `p sum_k (latency - start_k) / n`, over those who send: its slope by the latency
    is p times their share. Squared queues count relative to their budgets, which sets the exchange of J for s.
    """
    queue_s = queues["queue_s"]
    if options.energy_budget_j is None:
        return queue_s
    exchange_s_per_j = options.latency_budget_s / options.energy_budget_j
    senders = jnp.sum(common.able(observation)) / jnp.maximum(jnp.sum(observation.weights > 0), 1)
    return queue_s + exchange_s_per_j**2 * queues["energy_queue_j"] * observation.radio.power_w * senders


METHOD = Method("control", "tsfa", TsfaConfig, make, needs=frozenset({"side_by_side", "in_step"}))
