"""The offline stage from end to end: pilot, channel, search; what it finds is a plan that a run can take."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console

from fedjax_lora.config.assemble import build
from fedjax_lora.config.catalogue import Catalogue, check_needs
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig
from fedjax_lora.control import tsfa_online
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core import memory
from fedjax_lora.core.methods import Method
from fedjax_lora.core.network import Radio
from fedjax_lora.core.numbers import split
from fedjax_lora.core.progress import Progress
from fedjax_lora.core.types import FedState
from fedjax_lora.data.batches import hold_out
from fedjax_lora.io.plan import Plan, described
from fedjax_lora.planning import rank_descent, rank_search
from fedjax_lora.planning.pilot import Pilot, make_pilot, sample_of
from fedjax_lora.planning.rank_search import Candidate, Forecast
from fedjax_lora.planning.rollout import roll_out
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.network import draw_channel
from fedjax_lora.sim.parts import World
from fedjax_lora.training.optimizers import schedule

HELD_OUT = 10
"""One example in so many of each client's is kept from the pilot and the rollouts; the rollouts are scored on them."""

NEEDS = frozenset(
    {
        "one_rank",  # the pilot has one rank for all
        "even_ranks",  # and for all layers
        "start_from_broadcast",  # it knows of no factors of a client's own
        "shared_b",
        "latency_alone",  # the price of energy is not searched
        "single_attempt",  # the draws know of no retries
        "whole_tail",
        "memoryless_server",  # the bound is of a server that steps to the average
        "whole_step",
        "whole_at_client",  # the draws know of no exchange while clients train
        "in_step",  # the draws know of no clients that are late
        "listed_examples",  # of each client some are held out
        "whole_pool",  # by rows of it
    }
)
"""Properties of an experiment that the offline stage takes for granted, see `config.properties`."""


class Survey(NamedTuple):
    """What is known before a choice, at each candidate rank.

    Neither the latency budget nor `PlanConfig`'s objective, search and tolerance enter: one survey serves them all.

    world: with examples held out as its test pool. state: at the start. candidates: leading axis of ranks.
    factors: `[T]` of the learning rate.
    """

    simulation: Simulation
    world: World
    state: FedState
    candidates: Candidate
    factors: Array


def plan(config: ExperimentConfig, console: Console, methods: Sequence[Method] = ()) -> Plan:
    """Choose the structural rank, V and the first queue for a configuration whose control is `tsfa`.

    No held-out example of the run is looked at: the pilot and the rollouts have training examples alone.

    Args:
      config: of the run.
      console: for what is being done.
      methods: a user's own.

    Raises:
      ConfigError: the configuration has nothing to plan, or its parts do not fit together.
    """
    with Progress(console) as progress:
        return choose(survey(config, progress, methods), config, progress)


def survey(config: ExperimentConfig, progress: Progress, methods: Sequence[Method] = ()) -> Survey:
    """Pilots at the candidate ranks, and draws of the channel."""
    check(config, methods)
    progress.stage("reading the model and the data")
    simulation = build(config, methods)
    ranks = rank_search.candidate_ranks(config.plan, config.lora.max_rank)
    # Of each client of a cohort two numbers, see `Radio`.
    drawn = 8 * len(ranks) * config.plan.paths * config.rounds * simulation.layout.cohort_size
    memory.check([memory.Term(drawn, f"lower plan.paths, got {config.plan.paths}")], 1)
    world = dataclasses.replace(simulation.world, data=hold_out(simulation.world.data, HELD_OUT))
    state = simulation.init(jax.random.key(config.seed))
    # A round's number that the run does not reach: nothing is drawn twice.
    pilot_key, channel_key, rollout_key = jax.random.split(jax.random.fold_in(state.key, config.rounds), 3)
    progress.begin(f"pilot: {config.plan.pilot_rounds} rounds at rank {', '.join(map(str, ranks))}")
    at_pilot = dataclasses.replace(state, key=pilot_key)
    factors = round_factors(config)
    seen = factors[: 1 + config.plan.pilot_rounds]
    pilots = run_pilots(simulation, world, at_pilot, jnp.array(ranks, jnp.float32), seen)
    if clipped := [rank for rank, L in zip(ranks, pilots.measured.smoothness, strict=True) if L == 0]:
        progress.print(
            f"note: at rank {', '.join(map(str, clipped))} the loss fell faster than its slope in the pilot: the bound "
            "knows no noise there; more plan.pilot_rounds may tell"
        )
    candidates = with_channel(simulation, world, state, channel_key, pilots, config)
    state = dataclasses.replace(state, key=rollout_key)
    return Survey(simulation, world, state, candidates, factors)


def check(config: ExperimentConfig, methods: Sequence[Method] = ()) -> None:
    """Refuse what a plan would leave out of account.

    Raises:
      ConfigError: names the key, what it must be for a plan, and what it got.
    """
    options, rounds = config.plan, config.rounds
    if not isinstance(config.control, TsfaConfig):
        raise ConfigError(f"control.name must be tsfa, for a plan, got {config.control.name!r}")
    check_needs(config, Catalogue.of(methods), NEEDS, "a plan")
    if options.pilot_rounds >= rounds:
        raise ConfigError(f"plan.pilot_rounds must be below rounds = {rounds}, for a plan, got {options.pilot_rounds}")
    if options.objective == "rollout" and options.rollout_rounds > rounds:
        allowed = f"at most rounds = {rounds}"
        raise ConfigError(f"plan.rollout_rounds must be {allowed}, for a plan, got {options.rollout_rounds}")


def choose(known: Survey, config: ExperimentConfig, progress: Progress) -> Plan:
    """The plan under the latency budget of the configuration, by its objective and search.

    Args:
      known: of this configuration, or of one with other numbers of control and another section `plan`.
      config: of the run.
      progress: for what is being done.

    Raises:
      ConfigError: no candidate has a bound to choose it by.
    """
    control, options, candidates, factors = config.control, config.plan, known.candidates, known.factors
    assert isinstance(control, TsfaConfig)  # else there would be no survey
    most_s = control.latency_budget_s * (1.0 + options.tolerance)
    progress.begin(f"control: {config.rounds} rounds, {options.paths} draws of the channel")
    rows = rank_search.best_V(rank_search.grid(control, candidates, factors), most_s)
    allowed_s = rank_search.most_latency(rows.latency_s, control.latency_budget_s, options.tolerance)
    if options.objective == "bound" and not jnp.isfinite(rows.score).any():
        rate, rounds = config.local.optimizer.learning_rate, options.pilot_rounds
        raise ConfigError(
            "local.optimizer.learning_rate must be one with which the pilot moves downhill at some rank, "
            f"got {rate} over {rounds} rounds"
        )
    rollout = excess = None
    if options.objective == "rollout":
        progress.begin(f"rollout: {options.rollout_rounds} rounds, {options.seeds} seeds")
        state = dataclasses.replace(known.state, numbers={**known.state.numbers, **split(control, "control.")[1]})
        found = candidates.rank, rows.V, rows.queue_s
        rollout = roll_out(known.simulation, known.world, state, *found, options.seeds, options.rollout_rounds)
        chosen, excess = rank_search.best_rank_by_seeds(rows.latency_s, rollout.loss, rows.score, allowed_s)
    elif options.search == "gradient":
        chosen, rows = _descended(control, known, rows, allowed_s, progress)
    else:
        chosen = rank_search.best_rank(rows.latency_s, rows.score, allowed_s)
    found = jax.device_get((factors, rows, candidates.measured, rollout, excess))
    return described(config, chosen, most_s, *found)


def run_pilots(simulation: Simulation, world: World, state: FedState, ranks: Array, factors: Array) -> Pilot:
    """A pilot at each of the ranks `[n]`, in one program; `factors` as in `make_pilot`."""
    pilot = make_pilot(simulation.make_parts, simulation.full_gradient, factors)

    @jax.jit
    def every(world: World, state: FedState, ranks: Array) -> Pilot:
        key = jax.random.fold_in(state.key, len(factors))
        sample = sample_of(world, simulation.make_parts(state.numbers), key)
        return lax.map(lambda rank: pilot(world, sample, state, rank), ranks)

    return every(world, state, ranks)


def with_channel(
    simulation: Simulation, world: World, state: FedState, key: Array, pilots: Pilot, config: ExperimentConfig
) -> Candidate:
    """What the pilots measured, and the channel that each rank's broadcast leaves; all ranks see the same fading.

    On one device: control looks at all clients at once.
    """
    layout, keys = simulation.layout, jax.random.split(key, config.plan.paths)
    size = layout.padded_cohort

    @jax.jit
    def every(world: World, state: FedState, keys: Array, downlink_bits: Array) -> Radio:
        parts = simulation.make_parts(state.numbers)
        work = parts.trainer.work(world.data.count)

        def path(key: Array, bits: Array) -> Radio:
            lengths = {"rounds": config.rounds, "cohort_size": layout.cohort_size, "size": size}
            return draw_channel(parts.wireless, work, state.methods["wireless"], key, bits, **lengths).radio

        return jax.vmap(jax.vmap(path, (0, None)), (None, 0))(keys, downlink_bits)

    radio = every(world, state, keys, pilots.downlink_bits)
    shared = {name: getattr(pilots, name) for name in Candidate._fields if name in Pilot._fields}
    return _on_one_device(Candidate(**shared, radio=radio))


def _on_one_device(tree: Any) -> Any:
    """By way of the host."""
    return jax.tree.map(jnp.asarray, jax.device_get(tree))


def round_factors(config: ExperimentConfig) -> Array:
    """`[T]` the schedule's mean factor in each round."""
    optimizer, steps = config.local.optimizer, config.rounds * config.local.steps
    factors = jnp.broadcast_to(schedule(optimizer, steps, jnp.arange(steps)), steps)
    return jnp.mean(factors.reshape(config.rounds, config.local.steps), 1)


def _descended(
    control: TsfaConfig, known: Survey, rows: Forecast, most_s: Array, progress: Progress
) -> tuple[int, Forecast]:
    """The candidate next to where the gradient search ended, and the rows with its V and first queue in that one.

    Between candidates the latency is another than at them: only those that some V of the grid brings within
    `most_s` are chosen from, and the grid's V stays where the search's does not do so. A candidate without a finite
    bound has no part in the search.
    """
    candidates, factors, finite = known.candidates, known.factors, jnp.isfinite(rows.score)
    usable = finite & (rows.latency_s <= most_s)
    if not usable.any():
        return rank_search.best_rank(rows.latency_s, rows.score, most_s), rows
    found = rank_descent.gradient(control, jax.tree.map(lambda x: x[finite], candidates), factors, most_s)
    distance = jnp.abs(jnp.log(candidates.rank) - jnp.log(found.rank))
    chosen = int(jnp.argmin(jnp.where(usable, distance, jnp.inf)))
    own: Candidate = jax.tree.map(lambda x: x[chosen], candidates)
    V, price = found.weight * rank_search.unit_of_V(control, own), rows.queue_s[chosen] / rows.V[chosen]
    row = rank_search.forecast(tsfa_online.make, rank_search.at_price(control, V, price), own, factors)
    progress.print(f"gradient search: ended at rank {found.rank:.3f}; the candidate is {own.rank:.0f}")
    if row.latency_s > most_s:
        progress.print(f"note: V {V:.4g} of the search takes too long there; V is the grid's")
        return chosen, rows
    return chosen, jax.tree.map(lambda all_rows, x: all_rows.at[chosen].set(x), rows, row)
