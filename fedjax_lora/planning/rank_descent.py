"""The search of a rank between whole ones: what the candidates measured, interpolated, and a descent in rank and V.

The rank is relaxed so that `tsfa_online.solve` can be differentiated by it; the relaxation is our own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from fedjax_lora.control import tsfa_online
from fedjax_lora.control.common import Queues
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.network import Controller, Decision, Observation
from fedjax_lora.core.numbers import Numbers, fill, split
from fedjax_lora.planning.rank_search import NEAR, WEIGHTS, Candidate, at, at_price, forecast, latency_price, unit_of_V

_STEPS, _RATE, _EXCESS_WEIGHT = 40, 0.3, 20.0  # of the gradient search: the logarithms of rank and V fall by 6 or so


def relaxed(options: TsfaConfig) -> Controller:
    """The controller of a run without rounding, for ranks between whole ones, and with gradients."""

    def allocate(queues: Queues, observation: Observation) -> Decision:
        radio, rank = observation.radio, observation.rank
        found = tsfa_online.solve(
            observation.bits,  # the last step ends beyond the rank
            radio.snr_hz,
            radio.start_s,
            radio.band_hz,
            observation.weights,
            tsfa_online.left_out(options.tail, observation),
            queues["queue_s"],
            options.V,
            min_keep_ratio=jnp.maximum(options.min_keep_ratio, 1.0 / rank),
            max_keep_ratio=options.max_keep_ratio,
            rank=rank,
            ratio=options.ratio,
        )
        return Decision(found.keep_ratio * rank, found.bandwidth_hz, found.latency_s, found.objective)

    return tsfa_online.make(options)._replace(allocate=allocate)


class Descent(NamedTuple):
    """Where the gradient search ended.

    rank: between whole ones. weight: V in units of `unit_of_V`. history: `[starts, steps]` of what is minimised.
    """

    rank: Array
    weight: Array
    history: Array


def gradient(config: TsfaConfig, candidates: Candidate, factors: Array, most_latency_s: ArrayLike) -> Descent:
    """Descend in the logarithms of rank and V, from each of the candidates with the largest V.

    What was measured is noisy: between the candidates the bound has several local minima. Minimised is the logarithm of
    the bound and, where the latency exceeds `most_latency_s`, a multiple of the excess. The price of latency, and with
    it the first queue, is linear between those of the candidates. The largest V holds the drawn rounds next to the
    budget. As in the grid a smaller one is better at nearly the same bound: V's whole range costs as much as NEAR does.
    """
    return _gradient(*split(config), candidates, factors, jnp.asarray(most_latency_s, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    structure: TsfaConfig, numbers: Numbers, candidates: Candidate, factors: Array, most_latency_s: Array
) -> Descent:
    options = fill(structure, numbers)
    low, high = (jnp.log(jnp.stack([candidates.rank[end], jnp.float32(WEIGHTS[end])])) for end in (0, -1))
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))
    prices = jax.vmap(lambda own: latency_price(relaxed, options, own))(candidates)

    def objective(logs: Array) -> Array:
        rank, weight = jnp.exp(logs)
        own = between(candidates, rank)
        V, price = weight * unit_of_V(options, own), jnp.interp(rank, candidates.rank, prices)
        found = forecast(relaxed, at_price(options, V, price), own, factors)
        excess = jnp.maximum(found.latency_s / most_latency_s - 1.0, 0.0)
        large = (logs[1] - low[1]) / (high[1] - low[1])
        return jnp.log(found.score) + NEAR * large + _EXCESS_WEIGHT * excess

    def descend(start: Array) -> tuple[Array, Array, Array]:
        def step(carry, _):
            logs, state, least, best = carry
            value, slope = jax.value_and_grad(objective)(logs)
            least, best = jnp.minimum(value, least), jnp.where(value < least, logs, best)
            updates, state = optimizer.update(slope, state)
            return (jnp.clip(logs + updates, low, high), state, least, best), value

        carry = start, optimizer.init(start), jnp.float32(jnp.inf), start
        (_, _, least, best), history = lax.scan(step, carry, length=_STEPS)
        return least, best, history

    starts = jnp.stack([jnp.log(candidates.rank), jnp.full_like(candidates.rank, high[1])], axis=1)
    least, best, history = jax.vmap(descend)(starts)
    found = jnp.exp(best[jnp.argmin(least)])
    return Descent(found[0], found[1], history)


def between(candidates: Candidate, rank: Array) -> Candidate:
    """The candidate of a rank between others: what they measured at the same keep ratio, linear in the rank."""
    num_ranks = candidates.bits.shape[-1]
    ratio = jnp.minimum(jnp.arange(num_ranks) / rank, 1.0)
    aligned = jax.vmap(lambda table, own: at(table, ratio * own))
    tails = jax.vmap(lambda table, own: jax.vmap(lambda row: at(row, ratio * own))(table))
    names = ("bits", "sparsification", "covariance")
    tables = {name: aligned(getattr(candidates, name), candidates.rank) for name in names}
    candidates = candidates._replace(tail_energy=tails(candidates.tail_energy, candidates.rank), **tables)
    position = jnp.interp(rank, candidates.rank, jnp.arange(len(candidates.rank), dtype=jnp.float32))
    own: Candidate = jax.tree.map(lambda leaf: at(leaf, position), candidates)
    tables = {name: _up_to(rank, getattr(own, name)) for name in names}
    tail_energy = jax.vmap(lambda row: _up_to(rank, row))(own.tail_energy)
    return own._replace(rank=rank, tail_energy=tail_energy, **tables)


def _up_to(rank: Array, table: Array) -> Array:
    """A table `[R + 1]` whose last row is that of `rank`, its rows above such that `at(table, rank)` is that row."""
    low = jnp.floor(rank)
    share, below = rank - low, at(table, low)
    above = below + (table[-1] - below) / jnp.where(share > 1e-3, share, 1.0)
    return jnp.where(jnp.arange(table.shape[0]) > low, above, table)
