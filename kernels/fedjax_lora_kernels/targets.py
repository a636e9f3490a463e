"""What a kernel is compiled for, and the blocks that suit it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

Target = Literal["tpu", "gpu", "cpu"]
"""A TPU, by its compiler Mosaic; a GPU, by Triton; or a CPU, by the interpreter of Pallas."""

LANES = 128
"""Numbers side by side in a register of a TPU; eight such rows make one."""

VMEM_BYTES = 64 * 2**20
"""Of a TPU's vector memory, 128 MB, that a kernel may use; the compiler's own limit is 16 MB."""


def on_its_platform(kernel: Callable[..., Any], *arrays: Any) -> Any:
    """`kernel(*arrays, target=...)` for the platform that the program around it is compiled for."""
    targets: dict[str, Target] = {"cpu": "cpu", "tpu": "tpu", "default": "gpu"}
    return lax.platform_dependent(
        *arrays, **{platform: functools.partial(kernel, target=target) for platform, target in targets.items()}
    )


def options(target: Target) -> dict[str, Any]:
    """Arguments of `pallas_call` for this target."""
    if target == "cpu":
        return {"interpret": True}
    if target == "tpu":
        return {"compiler_params": tpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES)}
    return {"compiler_params": triton.CompilerParams()}


def cost(flop: int, arrays: Sequence[jax.ShapeDtypeStruct | jax.Array], roots: int = 0) -> pl.CostEstimate:
    """What a kernel tells the compiler of itself: its work, and every array read or written once."""
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flop, bytes_accessed=size, transcendentals=roots)


def power_of_two(length: int, most: int) -> int:
    """The largest power of two that divides the length, at most `most`, which is one.

    Blocks of it fit a GPU, whose compiler wants powers of two, and none hangs over the edge, so nothing needs a mask.
    """
    return math.gcd(length, most)


def stretch(length: int, most: int) -> int:
    """All of the length where it is at most `most`, else as many whole rows of lanes as fit, at least one.

    The last block of a TPU may hang over the edge: what is read there is undefined, what is written there is dropped.
    """
    return length if length <= most else max(most // LANES, 1) * LANES
