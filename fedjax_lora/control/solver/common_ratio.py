"""TSFA online with one keep ratio for all: a search over that ratio, with the gradient of its optimum."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.control.solver.best_response import Problem
from fedjax_lora.control.solver.shares import objective

_HALVINGS = 22
_KINK = 1e-2  # of the slopes' scale: a slope this far from 0 changes its sign by a jump
_AT = 1e-4  # ranks: so near to where a step begins an optimum is held there


@jax.custom_jvp
def common_share(problem: Problem, begin: Array, length: Array, rank: Array) -> Array:
    """`[K, S]` share of each step that is sent where all clients keep the same ratio, within each one's limits.

    The best of the whole ranks and then the best ratio next to it, by the sign of the slope. Where all clients start
    together the objective is convex in the ratio, and this is its minimum.

    Args:
      problem: what could be sent.
      begin: `[K, S]` rank at which a step begins.
      length: `[K, S]` length of a step in ranks.
      rank: `[K]` ranks at ratio 1.
    """
    return _share(_best_ratio(problem, begin, length, rank), begin, length, rank)


def _share(ratio: Array, begin: Array, length: Array, rank: Array) -> Array:
    reached = (ratio * rank)[:, None] - begin
    return jnp.clip(jnp.where(length > 0, reached / jnp.where(length > 0, length, 1.0), 1.0), 0.0, 1.0)


def _slope(ratio: Array, problem: Problem, begin: Array, length: Array, rank: Array) -> Array:
    """Derivative of the objective by the ratio."""

    def at(ratio: Array) -> Array:
        return objective(problem, _share(ratio, begin, length, rank))

    return jax.jvp(at, (ratio,), (jnp.ones_like(ratio),))[1]


def _best_ratio(problem: Problem, begin: Array, length: Array, rank: Array) -> Array:
    num_steps = length.shape[-1]
    lowest = jnp.min(begin[:, 0] / rank, initial=1.0)
    highest = jnp.max(jnp.where(problem.step_bits > 0, (begin + length) / rank[:, None], 0.0), initial=lowest)
    grid = jnp.clip(jnp.arange(num_steps + 1) / jnp.max(rank, initial=1.0), lowest, highest)
    values = jax.vmap(lambda ratio: objective(problem, _share(ratio, begin, length, rank)))(grid)
    # Of equals the last: what costs nothing is kept.
    best = num_steps - jnp.argmin(values[::-1])
    whole = grid[best]

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        rises = _slope(middle, problem, begin, length, rank) > 0
        return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

    below, above = jnp.max(grid, where=grid < whole, initial=lowest), jnp.min(grid, where=grid > whole, initial=highest)
    falls = _slope(whole * (1 - 1e-5), problem, begin, length, rank) > 0
    rises = _slope(whole * (1 + 1e-5), problem, begin, length, rank) >= 0
    bracket = jnp.where(falls, below, whole), jnp.where(falls | rises, whole, above)
    ratio = lax.fori_loop(0, _HALVINGS, halve, bracket)[1]
    return jnp.where(falls | (whole < highest), ratio, 1.0)  # at the highest everything is sent, whatever that ratio is


@common_share.defjvp
def _common_share_jvp(
    primals: tuple[Problem, Array, Array, Array], tangents: tuple[Problem, Array, Array, Array]
) -> tuple[Array, Array]:
    """Implicit in `slope = 0`. An optimum on a kink goes with the rank at which that step begins or ends.

    Where everything is sent, everything goes on to be.
    """
    problem, begin, length, rank = primals
    _, d_begin, d_length, d_rank = tangents
    ratio = _best_ratio(*primals)
    by_ratio = jax.jvp(lambda ratio: _share(ratio, begin, length, rank), (ratio,), (jnp.ones_like(ratio),))[1]
    slope, d_slope = jax.jvp(lambda *moved: _slope(ratio, *moved), primals, tangents)
    curvature = jax.jvp(lambda ratio: _slope(ratio, *primals), (ratio,), (jnp.ones_like(ratio),))[1]
    ends, there = jnp.stack([begin, begin + length]), (problem.step_bits > 0) & (ratio < 1)
    held = (jnp.abs(ratio * rank[:, None] - ends) < _AT) & there
    flat = jnp.abs(slope) < _KINK * jnp.sum(by_ratio * problem.step_bits * problem.worth)
    smooth = flat & (curvature > 0) & ~held.any()
    with_step = (jnp.stack([d_begin, d_begin + d_length]) - ratio * d_rank[:, None]) / rank[:, None]
    d_ratio = jnp.where(
        smooth,
        -d_slope / jnp.where(smooth, curvature, 1.0),
        jnp.sum(jnp.where(held, with_step, 0.0)) / jnp.maximum(jnp.sum(held), 1),
    )
    return jax.jvp(_share, (ratio, begin, length, rank), (d_ratio, d_begin, d_length, d_rank))
