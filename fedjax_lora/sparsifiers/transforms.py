"""What happens to the numbers of every message on their way: nothing, or stochastic quantisation.

QSGD: D. Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017;
here with the largest magnitude of each tensor as its scale and a fixed number of bits for a value.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.exchange import Message, Transform

SCALE_BITS = 32
"""Bits of the scale of each tensor, a float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How values travel on the uplink.

    bits: of a value; 32 is exact, 8 and 4 are rounded at random, without bias, to that many.
    """

    bits: Literal[32, 8, 4] = 32

    def __post_init__(self) -> None:
        if self.bits not in (32, 8, 4):
            raise ValueError(f"bits must be one of 32, 8, 4, got {self.bits}")


def chain(config: WireConfig) -> tuple[Transform, ...]:
    """The transforms of these options, in order; none where numbers travel in full."""
    if config.bits == 32:
        return ()
    levels = 2 ** (config.bits - 1) - 1

    def quantised(tensors: Any, key: Array) -> Any:
        leaves, structure = jax.tree.flatten(tensors)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([quantise(leaf, part, levels) for leaf, part in zip(leaves, keys, strict=True)])

    return (Transform(apply=quantised, bits_per_value=config.bits, bits_per_tensor=SCALE_BITS),)


def apply(transforms: Sequence[Transform], message: Message, key: Array) -> Message:
    """The message as it arrives: its tensors after each transform in turn, and still zero where nothing is sent.

    Args:
      transforms: in order.
      message: of one client.
      key: consumed; a single transform is given it as it is.
    """
    keys = [key] if len(transforms) == 1 else jax.random.split(key, max(len(transforms), 1))
    tensors = message.tensors
    for transform, part in zip(transforms, keys, strict=False):
        arrived = transform.apply(tensors, part)
        tensors = jax.tree.map(lambda x, mask: jnp.where(mask, x, 0.0), arrived, message.sent)
    return message._replace(tensors=tensors)


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
