"""A frozen projection and its adapter for many clients that share the frozen matrix."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.types import Factors
from fedjax_lora.ops import primitives
from fedjax_lora.ops.implementations import Implementation, chosen
from fedjax_lora_kernels import lora_matmul as kernel
from fedjax_lora_kernels.targets import Target, on_its_platform


def lora_matmul(
    x: Array, w: Array, factors: Factors, scale: ArrayLike = 1.0, *, implementation: Implementation | None = None
) -> Array:
    """`x w + s (x a_c) b_c` for every client c; products in the dtype of `w`, sums in float32.

    Args:
      x: `[C, T, n_in]` float32.
      w: `[n_in, n_out]`, as it is or packed, see `primitives.pack`.
      factors: `a [C, n_in, R]`, `b [C, R, n_out]`; of several modules side by side too, see `adapters.lora.project`.
      scale: s.
      implementation: `xla` is the reference, and what None stands for: `primitives.project` of each client; `pallas`
        lays the factors of several clients side by side, forward and backward.

    Returns:
      `[C, T, n_out]` float32.
    """
    if not x.shape[0] == factors.a.shape[0] == factors.b.shape[0]:
        shapes = x.shape, factors.a.shape, factors.b.shape
        raise ValueError(f"x, a and b must be of as many clients, got {', '.join(map(str, shapes))}")
    scaled = Factors(a=factors.a, b=jnp.asarray(scale) * factors.b)
    if chosen(implementation) == "xla":
        return jax.vmap(primitives.project, (0, None, 0))(x, w, scaled)
    return _pallas(x, w, scaled)


@jax.custom_vjp
def _pallas(x: Array, w: Array, factors: Factors) -> Array:
    def forward(x: Array, w: Array, a: Array, b: Array, *, target: Target) -> Array:
        return kernel.lora_matmul(x, w, a, b, target=target)

    return on_its_platform(forward, x, primitives.unpack(w), *_by_rank(factors))


def _by_rank(factors: Factors) -> tuple[Array, Array]:
    return jnp.swapaxes(factors.a, -1, -2), factors.b


def _backward(saved: tuple[Array, Array, Factors], g: Array) -> tuple[Array, Array | None, Factors]:
    x, packed, factors = saved
    w = primitives.unpack(packed)
    a, b = _by_rank(factors)

    def to_x(g: Array, w: Array, a: Array, b: Array, *, target: Target) -> Array:
        return kernel.lora_matmul(g, w, b, a, transposed=True, target=target)

    def to_factors(x: Array, g: Array, a: Array, b: Array, *, target: Target) -> tuple[Array, Array]:
        if target == "gpu":  # whose programs have no order in which to add up
            return _factor_gradients(x.astype(w.dtype), g.astype(w.dtype), a.astype(w.dtype), b.astype(w.dtype))
        return kernel.lora_gradients(x, g, a, b, dtype=w.dtype, target=target)

    da, db = on_its_platform(to_factors, x, g, a, b)
    # Nobody asks for it in training, and the compiler then drops it.
    dw = None
    if packed.dtype != jnp.uint16:
        dw = jnp.einsum("cti,cto->io", x.astype(w.dtype), g.astype(w.dtype), preferred_element_type=jnp.float32)
        dw = dw.astype(w.dtype)
    return on_its_platform(to_x, g, w, a, b), dw, Factors(a=jnp.swapaxes(da, -1, -2), b=db)


def _factor_gradients(x: Array, g: Array, a: Array, b: Array) -> tuple[Array, Array]:
    def dot(spec: str, left: Array, right: Array) -> Array:
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    of_g, of_x = dot("cto,cro->ctr", g, b).astype(g.dtype), dot("cti,cri->ctr", x, a).astype(x.dtype)
    return dot("ctr,cti->cri", of_g, x), dot("ctr,cto->cro", of_x, g)


_pallas.defvjp(lambda x, w, factors: (_pallas(x, w, factors), (x, w, factors)), _backward)
