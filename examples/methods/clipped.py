"""A server optimizer: steps to the average that are no longer than a norm.

fedjax-lora run CONFIG --methods examples/methods/clipped.py --set server=clipped server.max_norm=0.5
"""

import dataclasses
import math
from typing import Literal

import optax

from fedjax_lora.methods import Context, Method, Optimizer, Options, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedConfig(Options):
    """Short steps.

    max_norm: of a step over all adapters and the head.
    """

    name: Literal["clipped"] = "clipped"
    max_norm: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm must be positive and finite, got {self.max_norm!r}")


def make(options: ClippedConfig, context: Context) -> Optimizer:
    """An optax transformation of the pseudo-gradient `broadcast - average`; its number may be traced."""
    return Optimizer(*optax.chain(optax.clip_by_global_norm(options.max_norm), optax.sgd(1.0)))


METHOD = Method("server", "clipped", ClippedConfig, make, breaks=frozenset({"whole_step"}))
