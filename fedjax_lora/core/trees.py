"""Small helpers over pytrees that optax and jax.tree do not have."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def fits_float32(tree: Any) -> Array:
    """Scalar bool: whether the fourth power of the tree's norm is finite, and so all that is made of its leaves.

    Energies of products of two leaves, and Gram matrices of either, are no larger.
    """
    energy = sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), jnp.zeros(()))
    return jnp.isfinite(energy * energy)


def take(tree: Any, index: Array) -> Any:
    """Rows `index` of the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def where(condition: Array, on_true: Any, on_false: Any) -> Any:
    """Leaf-wise choice; `condition` is a scalar or is aligned with each leaf's first axes."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y)

    return jax.tree.map(choose, on_true, on_false)


def num_bytes(tree: Any) -> int:
    """Bytes that the leaves' elements take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
