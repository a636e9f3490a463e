"""Which part of the adapters is at the device, where a model is split between a device and a server.

What is at the device crosses the air at the end of a round; what is at the server is there already.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora.core.exchange import Message, Received, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters


class Side(NamedTuple):
    """What of the adapters a client sends.

    layers: of the model, whose adapters are at the device, in increasing order. head: whether the task's head is.
    """

    layers: tuple[int, ...]
    head: bool

    def take(self, adapters: Adapters) -> Adapters:
        """The device's part: modules `[len(layers), ...]`, and the head or none of it."""
        return Adapters(modules=self.take_layers(adapters.modules), head=adapters.head if self.head else {})

    def take_layers(self, whole: Any) -> Any:
        """Trees with leaves `[L, ...]` with the device's layers alone."""
        return jax.tree.map(lambda leaf: leaf[np.array(self.layers, np.int32)], whole)

    def shapes(self, like: Adapters | None) -> Adapters | None:
        """`take` of shapes."""
        return None if like is None else jax.eval_shape(self.take, like)

    def put(self, part: Adapters, whole: Adapters) -> Adapters:
        """The adapters with the device's part in place."""
        return Adapters(modules=self.put_layers(part.modules, whole.modules), head=part.head or whole.head)

    def put_layers(self, part: Any, whole: Any) -> Any:
        """Trees with leaves `[L, ...]` with those of the device's layers in place."""
        return jax.tree.map(lambda own, leaf: leaf.at[np.array(self.layers, np.int32)].set(own), part, whole)

    def sparsifier(self, whole: Sparsifier) -> Sparsifier:
        """The sparsifier of the device's part, whose penalty is asked of all adapters.

        Where no layer is there it remembers nothing, since arrays of no size can be neither mapped nor saved.
        """

        def penalty(adapters: Adapters, rank_mask: Array) -> Array:
            return whole.penalty(self.take(adapters), rank_mask)

        def encode(start: Adapters, trained: Adapters, memory: Any, *more: Any) -> Message:
            return whole.encode(start, trained, whole.init(start), *more)

        own = whole._replace(penalty=penalty)
        if self.layers:
            return own
        return own._replace(init=lambda adapters: (), encode=encode, remember=lambda *given: ())

    def received(self, part: Received, whole: Adapters, ranks: Array) -> Received:
        """What the server has of a client: the device's part as decoded, the rest as it is, in the ranks `[R]`."""
        everywhere = {
            name: jnp.broadcast_to(ranks, (factors.a.shape[0], ranks.shape[-1]))
            for name, factors in whole.modules.items()
        }
        return Received(self.put(part.adapters, whole), self.put_layers(part.counted, everywhere))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Options of the methods of slot `training`."""

    def side(self, num_layers: int) -> Side | None:
        """What of the adapters is at the device, of a model of so many layers; None for all."""
        del num_layers
        return None
