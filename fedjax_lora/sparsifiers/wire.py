"""How numbers travel: in full, or by stochastic quantisation, which goes with any sparsifier.

QSGD: D. Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017;
here with the largest magnitude of each tensor as its scale and a fixed number of bits for a value.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class WireConfig:
    """Bits of a value on the uplink: 32 is exact; 8 and 4 are rounded at random, without bias, to that many."""

    bits: Literal[32, 8, 4] = 32

    def __post_init__(self) -> None:
        if self.bits not in (32, 8, 4):
            raise ValueError(f"bits must be one of 32, 8, 4, got {self.bits}")


class Wire(NamedTuple):
    """An encoding of tensors.

    encode: `(x, key) -> x as it arrives`; a matrix of the last two axes is one tensor, see `quantise`.
    bits_per_value: of each number. bits_per_tensor: of the scale of each tensor.
    """

    encode: Callable[[Array, Array], Array]
    bits_per_value: int
    bits_per_tensor: int


FLOAT32 = Wire(encode=lambda x, key: x, bits_per_value=32, bits_per_tensor=0)
"""Numbers travel as they are."""


def arriving(wire: Wire, sent: Adapters, known: Adapters, key: Array) -> Adapters:
    """`sent` as the receiver decodes it, who knows `known` and is told the difference."""
    if wire is FLOAT32:
        return sent
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.subtract, sent, known))
    encoded = [wire.encode(leaf, part) for leaf, part in zip(leaves, jax.random.split(key, len(leaves)), strict=True)]
    return jax.tree.map(jnp.add, known, jax.tree.unflatten(structure, encoded))


def make_wire(config: WireConfig) -> Wire:
    """The encoding of these options."""
    if config.bits == 32:
        return FLOAT32
    levels = 2 ** (config.bits - 1) - 1

    def encode(x: Array, key: Array) -> Array:
        return quantise(x, key, levels)

    return Wire(encode=encode, bits_per_value=config.bits, bits_per_tensor=32)


def quantise(x: Array, key: Array, levels: int) -> Array:
    """`x` rounded at random to one of `2 levels + 1` steps between its extremes; its expectation is `x`.

    Args:
      x: `[..., n, m]`: each matrix of the last two axes has a scale of its own; a vector or scalar has one.
      key: consumed.
      levels: steps on either side of zero.
    """
    scale = jnp.max(jnp.abs(x), axis=tuple(range(max(x.ndim - 2, 0), x.ndim)), keepdims=True) / levels
    steps = x / jnp.where(scale > 0, scale, 1.0)
    return scale * jnp.clip(jnp.floor(steps + jax.random.uniform(key, x.shape)), -levels, levels)
