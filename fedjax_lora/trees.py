"""Small helpers over pytrees that optax and jax.tree do not have."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def all_finite(tree: Any) -> Array:
    """Scalar bool: whether every element of every leaf is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def take(tree: Any, index: Array) -> Any:
    """Rows `index` of the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def where(condition: Array, on_true: Any, on_false: Any) -> Any:
    """Leaf-wise choice; `condition` is a scalar or is aligned with each leaf's first axes."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y)

    return jax.tree.map(choose, on_true, on_false)


def num_bytes(tree: Any) -> int:
    """Bytes that the leaves' elements take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
