"""Places of numbers in an order, without the order."""

import jax.numpy as jnp
from jax import Array

COUNTED = 64
"""Most scores whose places are counted: that takes their square, but XLA sorts short rows slowly on a CPU."""


def descending_places(scores: Array) -> Array:
    """`[..., n]` int32 places in descending order; of equals the first comes first, and NaN is the largest."""
    return (_counted if scores.shape[-1] <= COUNTED else _sorted)(scores)


def _counted(scores: Array) -> Array:
    """How many are larger, or equal and before."""
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    own, others = scores[..., :, None], scores[..., None, :]
    before = (others > own) | ((others == own) & jnp.tri(scores.shape[-1], k=-1, dtype=bool))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def _sorted(scores: Array) -> Array:
    return jnp.argsort(jnp.argsort(scores, axis=-1, stable=True, descending=True), axis=-1)
