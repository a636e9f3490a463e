"""The offline stage from end to end: pilot, channel, search; what it finds is a plan that a run can take."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig
from fedjax_lora.control import tsfa_online
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core import memory
from fedjax_lora.core.progress import Progress
from fedjax_lora.core.types import FedState
from fedjax_lora.data.batches import hold_out
from fedjax_lora.io.plan import Plan, described
from fedjax_lora.planning import rank_descent as tsfa_relaxed
from fedjax_lora.planning import rank_search as tsfa_offline
from fedjax_lora.planning.pilot import Pilot, make_pilot, sample_of
from fedjax_lora.planning.rank_search import Outlook, Setting, Site
from fedjax_lora.planning.rollout import draw_weather, roll_out
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.parts import World
from fedjax_lora.training.optimizers import schedule

HELD_OUT = 10
"""One example in so many of each client's is kept from the pilot and the rollouts; the rollouts are scored on them."""


class Survey(NamedTuple):
    """What is known before a choice, at each candidate rank.

    Neither the latency budget nor `PlanConfig`'s objective, search and tolerance enter: one survey serves them all.

    world: with examples held out as its test pool. state: at the start. sites: leading axis of candidates.
    factors: `[T]` of the learning rate.
    """

    simulation: Simulation
    world: World
    state: FedState
    sites: Site
    factors: Array


def plan(config: ExperimentConfig, console: Console) -> Plan:
    """Choose the structural rank, V and the first queue for a configuration whose control is `tsfa`.

    No held-out example of the run is looked at: the pilot and the rollouts have training examples alone.

    Raises:
      ConfigError: the configuration has nothing to plan, or its parts do not fit together.
    """
    with Progress(console) as progress:
        return choose(survey(config, progress), config, progress)


def survey(config: ExperimentConfig, progress: Progress) -> Survey:
    """Pilots at the candidate ranks, and draws of the channel."""
    _check(config)
    progress.stage("reading the model and the data")
    simulation = build(config)
    candidates = tsfa_offline.candidates_of(config.plan, config.lora.max_rank)
    # Of each client of a cohort two numbers, see `Weather`.
    drawn = 8 * len(candidates) * config.plan.paths * config.rounds * simulation.parts.cohort_size
    memory.check([memory.Term(drawn, f"lower plan.paths, got {config.plan.paths}")], 1)
    world = dataclasses.replace(simulation.world, data=hold_out(simulation.world.data, HELD_OUT))
    state = simulation.init(jax.random.key(config.seed))
    # A round's number that the run does not reach: nothing is drawn twice.
    pilot_key, channel_key, rollout_key = jax.random.split(jax.random.fold_in(state.key, config.rounds), 3)
    progress.begin(f"pilot: {config.plan.pilot_rounds} rounds at rank {', '.join(map(str, candidates))}")
    at_pilot, ranks = dataclasses.replace(state, key=pilot_key), jnp.array(candidates, jnp.float32)
    factors = round_factors(config)
    pilots = run_pilots(simulation, world, at_pilot, ranks, factors[: 1 + config.plan.pilot_rounds])
    if clipped := [rank for rank, L in zip(candidates, pilots.measured.smoothness, strict=True) if L == 0]:
        progress.print(
            f"note: at rank {', '.join(map(str, clipped))} the loss fell faster than its slope in the pilot: the bound "
            "knows no noise there; more plan.pilot_rounds may tell"
        )
    sites = sites_of(simulation, world, state, channel_key, pilots, config)
    state = dataclasses.replace(state, key=rollout_key)
    return Survey(simulation, world, state, sites, factors)


def _check(config: ExperimentConfig) -> None:
    """Refuse what a plan would leave out of account."""
    control, server, wireless, options = config.control, config.server, config.wireless, config.plan
    prune, start = (getattr(config.aggregation, name, default) for name, default in (("prune", 1.0), ("start", None)))
    if not isinstance(control, TsfaConfig):
        raise ConfigError(f"control.name must be tsfa, for a plan, got {control.name!r}")
    for key, holds, allowed, got in (
        ("lora.client_ranks", not config.lora.client_ranks, "absent", config.lora.client_ranks),
        ("aggregation.start", start != "keep", "average or reinit", start),
        ("aggregation.prune", prune == 1.0, "1.0", prune),
        ("control.energy_budget_j", control.energy_budget_j is None, "null", control.energy_budget_j),
        ("wireless.retransmissions", wireless.retransmissions == 0, "0", wireless.retransmissions),
        ("aggregation.name", config.aggregation.name != "fedsa", "other than fedsa", config.aggregation.name),
        ("sparsifier.error_feedback", not getattr(config.sparsifier, "error_feedback", False), "false", True),
        ("server.name", server.name == "sgd", "sgd", server.name),
        ("server.learning_rate", server.learning_rate == 1.0, "1.0", server.learning_rate),
        (
            "plan.pilot_rounds",
            options.pilot_rounds < config.rounds,
            f"below rounds = {config.rounds}",
            options.pilot_rounds,
        ),
        (
            "plan.rollout_rounds",
            options.objective != "rollout" or options.rollout_rounds <= config.rounds,
            f"at most rounds = {config.rounds}",
            options.rollout_rounds,
        ),
    ):
        if not holds:
            raise ConfigError(f"{key} must be {allowed}, for a plan, got {got!r}")


def choose(known: Survey, config: ExperimentConfig, progress: Progress) -> Plan:
    """The plan under the latency budget of the configuration, by its objective and search.

    Raises:
      ConfigError: no candidate has a bound to choose it by.
    """
    control, options, sites = config.control, config.plan, known.sites
    assert isinstance(control, TsfaConfig)  # else there would be no survey
    bandwidth_hz = known.simulation.parts.link.bandwidth_hz
    hyper = _on_one_device(known.state.hyper)
    setting = Setting(control.latency_budget_s, known.factors, bandwidth_hz, hyper)
    most_s = control.latency_budget_s * (1.0 + options.tolerance)
    progress.begin(f"control: {config.rounds} rounds, {options.paths} draws of the channel")
    for_all = dataclasses.replace(control, latency_budget_s=1.0, queue_s=0.0, V=1.0)  # one program serves every budget
    rows = tsfa_offline.best_V(tsfa_offline.grid(for_all, setting, sites), most_s)
    allowed_s = tsfa_offline.most_latency(rows.latency_s, control.latency_budget_s, options.tolerance)
    if options.objective == "bound" and not jnp.isfinite(rows.score).any():
        rate, rounds = config.local.optimizer.learning_rate, options.pilot_rounds
        raise ConfigError(
            "local.optimizer.learning_rate must be one with which the pilot moves downhill at some rank, "
            f"got {rate} over {rounds} rounds"
        )
    rollout = excess = None
    if options.objective == "rollout":
        progress.begin(f"rollout: {options.rollout_rounds} rounds, {options.seeds} seeds")
        rollout = roll_out(
            known.simulation.parts,
            lambda V: tsfa_online.make(control, V),
            known.simulation.score,
            known.world,
            known.state,
            sites.rank,
            rows.V,
            rows.queue_s,
            options.seeds,
            options.rollout_rounds,
        )
        chosen, excess = tsfa_offline.best_rank_by_seeds(rows.latency_s, rollout.loss, rows.score, allowed_s)
    elif options.search == "gradient":
        chosen, rows = _descended(for_all, setting, sites, rows, allowed_s, progress)
    else:
        chosen = tsfa_offline.best_rank(rows.latency_s, rows.score, allowed_s)
    found = jax.device_get((known.factors, rows, sites.measured, rollout, excess))
    return described(config, chosen, most_s, *found)


def run_pilots(simulation: Simulation, world: World, state: FedState, ranks: Array, factors: Array) -> Pilot:
    """A pilot at each of the ranks `[n]`, in one program; `factors` as in `make_pilot`."""
    pilot = make_pilot(simulation.parts, simulation.full_gradient, factors)

    @jax.jit
    def every(world: World, state: FedState, ranks: Array) -> Pilot:
        sample = sample_of(world, simulation.parts, jax.random.fold_in(state.key, len(factors)))
        return lax.map(lambda rank: pilot(world, sample, state, rank), ranks)

    return every(world, state, ranks)


def sites_of(
    simulation: Simulation, world: World, state: FedState, key: Array, pilots: Pilot, config: ExperimentConfig
) -> Site:
    """What the pilots measured, under the channel that each rank's broadcast leaves; all ranks see the same fading.

    On one device: control looks at all clients at once.
    """

    @jax.jit
    def every(world: World, state: FedState, downlink_bits: Array):
        return jax.vmap(
            lambda bits: draw_weather(simulation.parts, world, state, key, bits, config.rounds, config.plan.paths)
        )(downlink_bits)

    weather = every(world, state, pilots.downlink_bits)
    shared = {name: getattr(pilots, name) for name in Site._fields if name in Pilot._fields}
    return _on_one_device(Site(**shared, snr_hz=weather.snr_hz, start_s=weather.start_s))


def _on_one_device(tree: Any) -> Any:
    """By way of the host."""
    return jax.tree.map(jnp.asarray, jax.device_get(tree))


def round_factors(config: ExperimentConfig) -> Array:
    """`[T]` the schedule's mean factor in each round."""
    optimizer, steps = config.local.optimizer, config.rounds * config.local.steps
    factors = jnp.broadcast_to(schedule(optimizer, steps)(jnp.arange(steps)), steps)
    return jnp.mean(factors.reshape(config.rounds, config.local.steps), 1)


def _descended(
    control: TsfaConfig, setting: Setting, sites: Site, rows: Outlook, most_s: Array, progress: Progress
) -> tuple[int, Outlook]:
    """The candidate next to where the gradient search ended, and the rows with its V and first queue in that one.

    Between candidates the latency is another than at them: only those that some V of the grid brings within
    `most_s` are chosen from, and the grid's V stays where the search's does not do so. A candidate without a finite
    bound has no part in the search.
    """
    known = jnp.isfinite(rows.score)
    usable = known & (rows.latency_s <= most_s)
    if not usable.any():
        return tsfa_offline.best_rank(rows.latency_s, rows.score, most_s), rows
    found = tsfa_relaxed.gradient(control, setting, jax.tree.map(lambda x: x[known], sites), most_s)
    distance = jnp.abs(jnp.log(sites.rank) - jnp.log(found.rank))
    chosen = int(jnp.argmin(jnp.where(usable, distance, jnp.inf)))
    site: Site = jax.tree.map(lambda x: x[chosen], sites)
    V, price = found.weight * tsfa_offline.unit_of_V(control, setting, site), rows.queue_s[chosen] / rows.V[chosen]
    queue_s = tsfa_offline.first_queue(price, V, setting.budget_s)
    row = tsfa_offline.outlook(tsfa_offline.whole_ranks(control), setting, site, V, queue_s)
    progress.print(f"gradient search: ended at rank {found.rank:.3f}; the candidate is {site.rank:.0f}")
    if row.latency_s > most_s:
        progress.print(f"note: V {V:.4g} of the search takes too long there; V is the grid's")
        return chosen, rows
    return chosen, jax.tree.map(lambda all_rows, x: all_rows.at[chosen].set(x), rows, row)
