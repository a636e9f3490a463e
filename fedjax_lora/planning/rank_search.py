"""TSFA offline: the structural rank, and V and first queue of the online stage, by a pilot and draws of the channel.

Stage 1 of B. Kim, W. Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates",
arXiv 2505.00333; the search, its objective and its constraint are our own. For each candidate rank the online
controller is run without training over draws of the channel, for as many rounds as the run has and from a first queue
at which they take the budget. It tells what a round sends and how long it takes, the pilot tells what is lost thereby,
and the bound puts a number on it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from fedjax_lora.control import tsfa_online
from fedjax_lora.control.common import Queues
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.network import Controller, Observation, Radio
from fedjax_lora.core.numbers import Numbers, fill, split
from fedjax_lora.planning import bound
from fedjax_lora.sim.network import Played, play

Objective = Literal["bound", "rollout"]
Search = Literal["grid", "gradient"]

WEIGHTS = tuple(10.0 ** (0.5 * power) for power in range(-4, 7))
"""What `grid` tries for V, in units of `unit_of_V`."""

AS_GOOD = 2.0, 0.25
"""By how much rollouts may exceed the least loss to pass for as good: standard errors, and a share of that loss."""

NEAR = 0.01  # by which share a score may exceed the least for the sake of a smaller V

_PRICES, _HALVINGS = (1e-4, 1e4), 18  # of latency: between them, in units of the budget over `unit_of_V`

_LONGEST_PLANNED = 1e4  # budgets: float32 still adds a thousandth of a budget to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How `fedjax-lora plan` chooses; every default is our choice.

    candidates: structural ranks; () is 1, 2, 4, ... and `lora.max_rank`.
    objective: the `bound`, or the loss after a simulated `rollout` on examples held out from training; of ranks that
      the seeds hardly tell apart that of least bound.
    search: `grid` tries every candidate and V; `gradient` relaxes the rank and descends in both.
    pilot_rounds: rounds that each candidate's pilot measures, after a first one.
    paths: draws of the fading over a whole run.
    tolerance: by which share the mean latency over the run's rounds may exceed the budget.
    rollout_rounds, seeds: of the rollout, each seed with its own batches and fading.
    """

    candidates: tuple[int, ...] = ()
    objective: Objective = "bound"
    search: Search = "grid"
    pilot_rounds: int = 8
    paths: int = 4
    tolerance: float = 0.05
    rollout_rounds: int = 10
    seeds: int = 5

    def __post_init__(self):
        if list(self.candidates) != sorted(set(self.candidates)) or min(self.candidates, default=1) < 1:
            raise ValueError(f"candidates must be increasing and at least 1, got {self.candidates}")
        for field, kind in (("objective", Objective), ("search", Search)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(f"{field} must be one of {', '.join(get_args(kind))}, got {getattr(self, field)!r}")
        if self.search == "gradient" and self.objective == "rollout":
            raise ValueError("search must be grid where objective is rollout, got 'gradient'")
        for field in ("pilot_rounds", "paths", "rollout_rounds", "seeds"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0 and finite, got {self.tolerance!r}")


class Candidate(NamedTuple):
    """What is known of a structural rank before a run; a leading axis of candidates where it is mapped.

    measured: of the pilot. rank: scalar. weights: `[C]`, which sum to 1. tail_energy: `[C, R + 1]`.
    bits, sparsification, covariance: `[R + 1]` at 0 ... R kept ranks, see `planning.pilot.Pilot`.
    radio: draws of the channel, leaves `[paths, T, C]` and `[paths, T]`.
    """

    measured: bound.Measured
    rank: Array
    weights: Array
    tail_energy: Array
    bits: Array
    sparsification: Array
    covariance: Array
    radio: Radio


class Forecast(NamedTuple):
    """What to expect of a rank, a V and a first queue; any leading axes.

    V: weight of what is not sent. queue_s: before round 1. latency_s: mean of a round. keep_ratio, kept_ranks,
    uplink_bits: mean of a client. final_queue_s: mean over the draws. terms: of the bound. score: the bound.
    """

    rank: Array
    V: Array
    queue_s: Array
    latency_s: Array
    keep_ratio: Array
    kept_ranks: Array
    uplink_bits: Array
    final_queue_s: Array
    terms: bound.BoundTerms
    score: Array


Make = Callable[[TsfaConfig], Controller]
"""The controller of options whose numbers may be traced: a run's, `tsfa_online.make`, or `rank_descent.relaxed`."""


def unit_of_V(options: TsfaConfig, candidate: Candidate) -> Array:
    """The budget squared over what all of the clients' tails amount to: V in proportion means the same at any scale."""
    whole = jnp.sum(candidate.weights * candidate.tail_energy[:, 0]) if options.tail == "energy" else 1.0
    return jnp.asarray(options.latency_budget_s**2 / jnp.maximum(whole, 1e-30))


def latency_price(make: Make, options: TsfaConfig, candidate: Candidate) -> Array:
    """The queue over V at which the drawn rounds take the budget on average and no more, if it stays; by bisection.

    It is the multiplier of the static problem, to which that ratio tends in a long run, and does not depend on V: it is
    searched with V = `unit_of_V`. 0 where all that may be sent is within the budget; where no price is enough, the
    largest that is tried, at which the least is sent.
    """
    V = unit_of_V(options, candidate)
    controller, budget_s = make(fill(options, {"V": V})), options.latency_budget_s

    def exceeds(price: Array) -> Array:
        def latency_s(radio: Radio) -> Array:
            decision = controller.allocate({"queue_s": price * V}, observed(candidate, radio))
            return jnp.asarray(decision.latency_s)

        return jnp.mean(jax.vmap(jax.vmap(latency_s))(candidate.radio)) > budget_s

    def price_at(log: Array) -> Array:
        return jnp.exp(log) * budget_s / V

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        over = exceeds(price_at(middle))
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    ends = jnp.log(jnp.float32(_PRICES[0])), jnp.log(jnp.float32(_PRICES[1]))
    _, log = lax.fori_loop(0, _HALVINGS, halve, ends)
    return jnp.where(exceeds(jnp.float32(0)), price_at(log), 0.0)


def first_queue(price: ArrayLike, V: ArrayLike, budget_s: ArrayLike) -> Array:
    """The queue before round 1, s, at a price of latency: V times it, as far as float32 can count rounds on it."""
    return jnp.minimum(jnp.asarray(price) * V, _LONGEST_PLANNED * budget_s)


def at_price(options: TsfaConfig, V: ArrayLike, price: ArrayLike) -> TsfaConfig:
    """The options with this V, and with the first queue at this price of latency."""
    return fill(options, {"V": V, "queue_s": first_queue(price, V, options.latency_budget_s)})


def forecast(make: Make, options: TsfaConfig, candidate: Candidate, factors: Array) -> Forecast:
    """The online stage without training, for T rounds from the first queue of the options; mean over rounds and draws.

    A client that cannot be heard in a round has no part in it. `factors` are `[T]` of the learning rate, see
    `bound.terms`.
    """
    controller, rank = make(options), candidate.rank
    tables = candidate.bits, candidate.sparsification, candidate.covariance

    def means(radio: Radio, played: Played) -> tuple[Array, ...]:
        kept = played.decision.kept
        heard = candidate.weights * (radio.snr_hz > 0)
        seen = kept / rank, kept, *(at(table, kept) for table in tables)
        cohort = (jnp.sum(heard * x) / jnp.maximum(jnp.sum(heard), 1e-30) for x in seen)
        return played.outcome.latency_s, *cohort

    def path(radio: Radio) -> tuple[Queues, tuple[Array, ...]]:
        return play(controller, controller.init(), radio, lambda radio: observed(candidate, radio), keep=means)

    queues, rounds = jax.vmap(path)(candidate.radio)
    *expected, sparsification, covariance = (jnp.mean(x, 0) for x in rounds)
    latency_s, keep_ratio, kept_ranks, bits = (jnp.mean(x) for x in expected)
    # What is left out is of first order in the learning rate, what averaging apart misses of second.
    terms = bound.terms(candidate.measured, sparsification * factors**2, covariance * factors**4, factors)
    return Forecast(
        rank=rank,
        V=jnp.asarray(options.V, jnp.float32),
        queue_s=jnp.asarray(options.queue_s, jnp.float32),
        latency_s=latency_s,
        keep_ratio=keep_ratio,
        kept_ranks=kept_ranks,
        uplink_bits=bits,
        final_queue_s=jnp.mean(queues["queue_s"]),
        terms=terms,
        score=terms.total,
    )


def observed(candidate: Candidate, radio: Radio) -> Observation:
    """What the controller sees of a drawn round `[C]`."""
    clients = candidate.weights.shape
    return Observation(
        radio=radio,
        weights=candidate.weights,
        rank=jnp.broadcast_to(candidate.rank, clients),
        tail_energy=candidate.tail_energy,
        bits=jnp.broadcast_to(candidate.bits, (*clients, *candidate.bits.shape)),
    )


def grid(config: TsfaConfig, candidates: Candidate, factors: Array) -> Forecast:
    """`[candidates, len(WEIGHTS)]`: every candidate with every V, each from its first queue, in one program.

    V and first queue of the configuration do not matter. One program serves every budget.
    """
    return _grid(*split(config), candidates, factors)


@functools.partial(jax.jit, static_argnums=0)
def _grid(structure: TsfaConfig, numbers: Numbers, candidates: Candidate, factors: Array) -> Forecast:
    options, make = fill(structure, numbers), tsfa_online.make

    def row(candidate: Candidate) -> Forecast:
        unit, price = unit_of_V(options, candidate), latency_price(make, options, candidate)

        def cell(V: Array) -> Forecast:
            return forecast(make, at_price(options, V, price), candidate, factors)

        return jax.vmap(cell)(jnp.array(WEIGHTS) * unit)

    return jax.vmap(row)(candidates)


def best_V(found: Forecast, most_latency_s: float) -> Forecast:
    """`[candidates]`: of each, a V of least score within the latency; where none is within, that of least latency.

    Of those with nearly the least score it is the smallest, whose queue follows a run's own fading the most.
    """
    within = found.latency_s <= most_latency_s
    among = jnp.where(within, found.score, jnp.inf)
    known = jnp.isfinite(among).any(1)  # where no score is, the least latency is what there is to go by
    near = among <= (1.0 + NEAR) * jnp.min(among, 1, keepdims=True)
    column = jnp.where(known, jnp.argmax(near, 1), jnp.argmin(found.latency_s, 1))
    return jax.tree.map(lambda x: jnp.take_along_axis(x, column[:, None], 1)[:, 0], found)


def most_latency(latency_s: Array, budget_s: float, tolerance: float) -> Array:
    """What a rank may take to be chosen: the budget, or the least latency where that is longer, and the tolerance.

    Many ranks come close to the least latency, since all may send few components. It stands in for every budget under
    it, also for one that it meets by the tolerance: else a slightly tighter budget would let more ranks in.
    """
    return (1.0 + tolerance) * jnp.maximum(budget_s, jnp.min(latency_s))


def best_rank(latency_s: Array, score: Array, most_latency_s: Array) -> int:
    """Position of the least score `[candidates]` within the latency, the first of equals; else of the least latency.

    A score that is not finite, of a pilot without progress or a rollout that diverged, is never the least.
    """
    within = (latency_s <= most_latency_s) & jnp.isfinite(score)
    return int(jnp.argmin(jnp.where(within, score, jnp.inf)) if within.any() else jnp.argmin(latency_s))


class Excess(NamedTuple):
    """`[candidates]`: loss over that of the best candidate, seed by seed: mean, and standard error (of one seed NaN).

    The best has the least mean loss within the latency; one that takes longer may have a negative excess.
    """

    mean: Array
    error: Array


def best_rank_by_seeds(latency_s: Array, loss: Array, score: Array, most_latency_s: Array) -> tuple[int, Excess]:
    """Position of the least bound among the ranks whose rollouts `[candidates, seeds]` pass for the best, and by what.

    The seeds are shared by the candidates, so that a difference is taken in each. What exceeds the least mean loss by
    no more than two standard errors of that difference passes, unless it does so by a quarter of that loss: a rank that
    goes astray in some seeds has a large error too. With many seeds the least loss is left alone, and so it is by a
    single one, which has no error.
    """
    least = best_rank(latency_s, loss.mean(1), most_latency_s)
    over, seeds = loss - loss[least], loss.shape[1]
    error = jnp.std(over, 1, ddof=1) / math.sqrt(seeds) if seeds > 1 else jnp.full(loss.shape[0], jnp.nan)
    excess = Excess(over.mean(1), error)
    errors, share = AS_GOOD
    passes = jnp.minimum(errors * jnp.nan_to_num(error), share * loss[least].mean())
    near = (latency_s <= most_latency_s) & (excess.mean <= passes) & jnp.isfinite(score)
    return int(jnp.argmin(jnp.where(near, score, jnp.inf))) if near.any() else least, excess


def at(table: Array, position: Array) -> Array:
    """Rows of a table at positions between whole ones, linear in between; leading axes of `position` first."""
    low = jnp.clip(jnp.floor(position), 0, max(table.shape[0] - 2, 0))  # the last row has a slope too
    share = (position - low).reshape(*position.shape, *(1,) * (table.ndim - 1))
    high = jnp.minimum(low + 1, table.shape[0] - 1).astype(jnp.int32)
    low = low.astype(jnp.int32)
    return table[low] + share * (table[high] - table[low])


def candidate_ranks(config: PlanConfig, max_rank: int) -> tuple[int, ...]:
    """The ranks to choose from."""
    if config.candidates:
        return config.candidates
    return tuple(sorted({2**power for power in range(max_rank.bit_length())} | {max_rank}))
