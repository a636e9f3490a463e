"""The search of a rank between whole ones: what the candidates measured, interpolated, and a descent in rank and V.

The rank is relaxed so that `tsfa_online.solve` can be differentiated by it; the relaxation is our own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from fedjax_lora.control import tsfa_online
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.methods import Decision, Observation
from fedjax_lora.planning.rank_search import (
    NEAR,
    WEIGHTS,
    Decide,
    Setting,
    Site,
    at,
    first_queue,
    latency_price,
    outlook,
    unit_of_V,
)

_STEPS, _RATE, _EXCESS_WEIGHT = 40, 0.3, 20.0  # of the gradient search: the logarithms of rank and V fall by 6 or so


def relaxed(config: TsfaConfig) -> Decide:
    """As `tsfa_offline.whole_ranks`, without rounding, for ranks between whole ones, and with gradients."""

    def decide(V: Array, observation: Observation) -> Decision:
        rank, whole = observation.rank, jnp.arange(observation.tail_energy.shape[-1])
        return tsfa_online.solve(
            jax.vmap(observation.payload_bits)(whole[:, None] / rank).T,  # the last step ends beyond the rank
            observation.snr_hz,
            observation.start_s,
            observation.bandwidth_hz,
            observation.weights,
            tsfa_online.left_out(config.tail, observation),
            observation.queue_s,
            V,
            min_keep_ratio=jnp.maximum(config.min_keep_ratio, 1.0 / rank),
            max_keep_ratio=config.max_keep_ratio,
            rank=rank,
            ratio=config.ratio,
        )

    return decide


class Descent(NamedTuple):
    """Where the gradient search ended.

    rank: relaxed. weight: V in units of `unit_of_V`. history: `[starts, steps]` of what is minimised.
    """

    rank: Array
    weight: Array
    history: Array


@functools.partial(jax.jit, static_argnums=0)
def gradient(config: TsfaConfig, setting: Setting, sites: Site, most_latency_s: Array | float) -> Descent:
    """Descend in the logarithms of rank and V, from each of the candidates with the largest V.

    What was measured is noisy: between the candidates the bound has several local minima. Minimised is the logarithm of
    the bound and, where the latency exceeds `most_latency_s`, a multiple of the excess. The price of latency, and with
    it the first queue, is linear between those of the candidates. The largest V holds the drawn rounds next to the
    budget. As in the grid a smaller one is better at nearly the same bound: V's whole range costs as much as NEAR does.
    """
    low, high = (jnp.log(jnp.stack([sites.rank[end], jnp.float32(WEIGHTS[end])])) for end in (0, -1))
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))
    decide = relaxed(config)
    prices = jax.vmap(lambda own: latency_price(decide, setting, own, unit_of_V(config, setting, own)))(sites)

    def objective(logs: Array) -> Array:
        rank, weight = jnp.exp(logs)
        site = between(sites, rank)
        V = weight * unit_of_V(config, setting, site)
        queue_s = first_queue(jnp.interp(rank, sites.rank, prices), V, setting.budget_s)
        found = outlook(decide, setting, site, V, queue_s)
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

    starts = jnp.stack([jnp.log(sites.rank), jnp.full_like(sites.rank, high[1])], axis=1)
    least, best, history = jax.vmap(descend)(starts)
    found = jnp.exp(best[jnp.argmin(least)])
    return Descent(found[0], found[1], history)


def between(sites: Site, rank: Array) -> Site:
    """The site of a rank between the candidates: what they measured at the same keep ratio, linear in the rank."""
    num_ranks = sites.payload_bits.shape[-1]
    ratio = jnp.minimum(jnp.arange(num_ranks) / rank, 1.0)
    aligned = jax.vmap(lambda table, own: at(table, ratio * own))
    tails = jax.vmap(lambda table, own: jax.vmap(lambda row: at(row, ratio * own))(table))
    names = ("payload_bits", "sparsification", "covariance")
    tables = {name: aligned(getattr(sites, name), sites.rank) for name in names}
    sites = sites._replace(tail_energy=tails(sites.tail_energy, sites.rank), **tables)
    position = jnp.interp(rank, sites.rank, jnp.arange(len(sites.rank), dtype=jnp.float32))
    site: Site = jax.tree.map(lambda leaf: at(leaf, position), sites)
    tables = {name: _up_to(rank, getattr(site, name)) for name in names}
    tail_energy = jax.vmap(lambda row: _up_to(rank, row))(site.tail_energy)
    return site._replace(rank=rank, tail_energy=tail_energy, **tables)


def _up_to(rank: Array, table: Array) -> Array:
    """A table `[R + 1]` whose last row is that of `rank`, its rows above such that `at(table, rank)` is that row."""
    low = jnp.floor(rank)
    share, below = rank - low, at(table, low)
    above = below + (table[-1] - below) / jnp.where(share > 1e-3, share, 1.0)
    return jnp.where(jnp.arange(table.shape[0]) > low, above, table)
