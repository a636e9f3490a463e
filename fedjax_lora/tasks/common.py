"""What tasks share: their options, a linear head, and means over a pool."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Learned
from fedjax_lora.core.numbers import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Options of the methods of slot `task`.

    learns: what the examples are to hold for the task, see `core.learning.Learned`.
    """

    learns: ClassVar[Learned] = "label"


def init_head(key: Array, d: int, columns: int, bias: bool = True) -> dict[str, Array]:
    """A fresh `{"w": [d, columns], "b": [columns]}`, or `w` alone."""
    head = {"w": 0.02 * jax.random.normal(key, (d, columns))}
    return {**head, "b": jnp.zeros(columns)} if bias else head


def linear(head: Mapping[str, Array], x: Array) -> Array:
    """`[..., d] -> [..., columns]` by a head `w`, and `b` where it has one."""
    y = x @ head["w"]
    return y + head["b"] if "b" in head else y


def check_classes(num_classes: int) -> None:
    """Raise ValueError for fewer than two classes."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")


def total(value: Array, weight: Array) -> Array:
    """Weighted sum of `[N]` over the examples whose weight is not 0."""
    return jnp.sum(jnp.where(weight > 0, value * weight, 0.0))


def mean(value: Array, weight: Array) -> Array:
    """Weighted mean of `[N]` over the examples whose weight is not 0; NaN without any."""
    return total(value, weight) / jnp.sum(weight)


def hits(logits: Array, label: Array) -> Array:
    """`[...]`: 1 where the label has the largest of `[..., classes]` logits, else 0; NaN where one is not finite."""
    finite = jnp.all(jnp.isfinite(logits), -1)
    return jnp.where(finite, jnp.argmax(logits, -1) == label, jnp.nan)
