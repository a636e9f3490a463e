"""Exact non-negative integers below 2**64 under `jit`, where JAX has none of 64 bits by default: counts of bits.

A float32 rounds beyond 2**24, and 2**32 bits are half a gigabyte: less than an update of a large model.

Example:
  >>> bits = Count.of(3_000_000_000) * 32
  >>> bits.exact()
  array(96000000000)
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

_HALF = 16


@struct.dataclass
class Count:
    """`high * 2**32 + low`, uint32 arrays of one shape; sums and products are exact below 2**64."""

    high: Array
    low: Array

    @classmethod
    def of(cls, value: ArrayLike) -> "Count":
        """Of a Python integer below 2**64, or of an array of non-negative integers below 2**32."""
        if isinstance(value, int):
            return cls(high=jnp.uint32(value >> 32), low=jnp.uint32(value & 0xFFFFFFFF))
        low = jnp.asarray(value).astype(jnp.uint32)
        return cls(high=jnp.zeros_like(low), low=low)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of either word."""
        return jnp.broadcast_shapes(self.high.shape, self.low.shape)

    def __add__(self, other: "Count") -> "Count":
        low = self.low + other.low
        return Count(high=self.high + other.high + (low < self.low).astype(jnp.uint32), low=low)

    def __mul__(self, factor: ArrayLike) -> "Count":
        """By an integer, or an array of integers, below 2**32."""
        short = isinstance(factor, int) and factor < 2**_HALF
        factor = jnp.asarray(factor).astype(jnp.uint32)
        product = (_short_product if short else _product)(self.low, factor)
        return Count(high=product.high + self.high * factor, low=product.low)

    def __le__(self, other: "Count") -> Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low <= other.low))

    def minimum(self, other: "Count") -> "Count":
        """The smaller of the two, element by element."""
        return where(self <= other, self, other)

    def __getitem__(self, index) -> "Count":
        return Count(high=self.high[index], low=self.low[index])

    def float32(self) -> Array:
        """Rounded: what control plans with."""
        return self.high.astype(jnp.float32) * 2.0**32 + self.low.astype(jnp.float32)

    def exact(self) -> np.ndarray:
        """On the host, int64: for counts below 2**63."""
        return np.asarray(self.high).astype(np.int64) * 2**32 + np.asarray(self.low).astype(np.int64)


def where(condition: Array, on_true: Count, on_false: Count) -> Count:
    """`jnp.where` of counts."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def total(counts: Iterable[Count]) -> Count:
    """Their sum; 0 of none."""
    counts = list(counts)
    return functools.reduce(Count.__add__, counts) if counts else Count.of(0)


@jax.jit  # one equation wherever it is used: a round has forty
def _short_product(x: Array, y: Array) -> Count:
    """Of two uint32, the second below 2**16."""
    middle = (x >> _HALF) * y + ((x & jnp.uint32(2**_HALF - 1)) * y >> _HALF)
    return Count(high=middle >> _HALF, low=x * y)


@jax.jit
def _product(x: Array, y: Array) -> Count:
    """Of two uint32, by halves."""
    mask = jnp.uint32(2**_HALF - 1)
    x_high, x_low, y_high, y_low = x >> _HALF, x & mask, y >> _HALF, y & mask
    cross = x_high * y_low + (x_low * y_low >> _HALF)  # below 2**32: (2**16 - 1)**2 + 2**16 - 1
    more = x_low * y_high + (cross & mask)
    high = x_high * y_high + (cross >> _HALF) + (more >> _HALF)
    return Count(high=high, low=x * y)
