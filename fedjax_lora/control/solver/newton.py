"""Newton's method within a bracket, for functions that also give a by-product."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

_ITERATIONS = 40
_WIDTH = 3e-6  # of a bracket that is closed
_TINY = 1e-30

Aux = TypeVar("Aux")


def newton(
    function: Callable[[Array, Aux], tuple[Array, Array, Aux]],
    low: Array,
    high: Array,
    start: Array,
    blank: Aux,
    tolerance: float,
) -> tuple[Array, Aux]:
    """A zero of a falling function in a bracket: Newton's steps, halves where they leave it or gain too little.

    The function takes a point and its own previous by-product, and gives value, slope and by-product; returned are
    the last point and its by-product.
    """

    class State(NamedTuple):
        low: Array
        high: Array
        point: Array
        upcoming: Array
        value: Array
        halved: Array
        steps: Array
        aux: Aux

    def unfinished(state: State) -> Array:
        open_ = (jnp.abs(state.value) > tolerance) & (state.high - state.low > _WIDTH)
        return (state.steps == 0) | (open_ & (state.steps < _ITERATIONS))

    def step(state: State) -> State:
        point = state.upcoming
        value, slope, aux = function(point, state.aux)
        low, high = jnp.where(value > 0, point, state.low), jnp.where(value > 0, state.high, point)
        proposed = point - value / jnp.minimum(slope, -_TINY)
        gains = state.halved | (jnp.abs(value) < 0.5 * jnp.abs(state.value))
        take = (proposed > low) & (proposed < high) & gains
        upcoming = jnp.where(take, proposed, 0.5 * (low + high))
        return State(low, high, point, upcoming, value, ~take, state.steps + 1, aux)

    first = State(low, high, start, start, jnp.full_like(low, jnp.inf), jnp.array(True), jnp.array(0), blank)
    final = lax.while_loop(unfinished, step, first)
    return final.point, final.aux
