"""How an operation is computed: by its reference, which XLA compiles, or by a Pallas kernel."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from fedjax_lora_kernels.targets import on_its_platform

Implementation = Literal["xla", "pallas"]

DEFAULT: Implementation = "xla"
"""What None stands for: no kernel has been found faster than XLA in a round yet, see `kernels/README.md`."""


def chosen(implementation: Implementation | None) -> Implementation:
    """The implementation that is asked for, or the default.

    Raises:
      ValueError: there is none of that name.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be None, 'xla' or 'pallas', got {implementation!r}")
    return implementation or DEFAULT


def with_gradients_of(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(*arrays, target=...)` on its platform, differentiated as the reference, which has the same values."""

    @jax.custom_vjp
    def call(*arrays: Any) -> Any:
        return on_its_platform(kernel, *arrays)

    def backward(arrays: tuple, cotangent: Any) -> Any:
        return jax.vjp(reference, *arrays)[1](cotangent)

    call.defvjp(lambda *arrays: (call(*arrays), arrays), backward)
    return call
