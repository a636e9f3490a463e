"""Rotary positions (Su et al., arXiv 2104.09864), as a `config.json` describes them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora.models.family import refuse

NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Type -> the fields that it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How fast the pairs of a head turn with the position; the fields have the names of `config.json`.

    rope_type: `linear` slows all of them by `factor`; `llama3` those of long waves alone.
    rope_theta: base of the wavelengths.
    low_freq_factor, high_freq_factor: waves are long of which fewer than the first fit in
      `original_max_position_embeddings` positions, and short of which more than the second do. What is between them is
      slowed in part.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be a number above 0, got {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            least = self.low_freq_factor
            raise ValueError(f"high_freq_factor must be above low_freq_factor = {least}, got {self.high_freq_factor}")


def read_rope(fields: Mapping[str, Any]) -> Rope:
    """Rope from the fields of a `config.json`: its `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Raises:
      ValueError: for what is not computed; names the field as the file does.
    """
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"rope_parameters must be an object of numbers, the same for all layers, got {given!r}")
    kind = given.get("rope_type") or given.get("type") or "default"
    every: dict[str, Any] = dict(fields) | dict(given) | {"rope_type": kind}
    refuse(every, {"rope_type": tuple(NEEDED), "partial_rotary_factor": (1.0,)})
    chosen: dict[str, Any] = {name: every.get(name) for name in NEEDED[kind]}
    return Rope(rope_type=kind, rope_theta=every.get("rope_theta", Rope.rope_theta), **chosen)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """`[head_dim / 2]` radians of each pair from one position to the next, float32."""
    found = rope.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.rope_type == "linear":
        found = found / rope.factor
    if rope.rope_type == "llama3":
        waves = rope.original_max_position_embeddings * found / (2 * math.pi)
        short = np.clip((waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        found = found * (short + (1 - short) / rope.factor)
    return found.astype(np.float32)


def rotation(rope: Rope, head_dim: int, position: Array) -> tuple[Array, Array]:
    """Cosine and sine of the angles at positions `[...]`, `[..., head_dim / 2]` each."""
    angle = position[..., None].astype(jnp.float32) * frequencies(rope, head_dim)
    return jnp.cos(angle), jnp.sin(angle)
