"""The operations of a transformer block, each with its own backward rule.

The rules are there for speed, on a CPU above all: they keep one array where automatic differentiation keeps
several, in the dtype that the products multiply in, and they order the products so that no large operand has to be
transposed. The gradient to a frozen weight is defined but costs nothing while nobody asks for it: the compiler drops
what is unused.

What an operation returns has the dtype of what it is given, float32 or bfloat16; inside, sums, norms and activations
are float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from fedjax_lora.core.types import Factors


def pack(x: Array) -> Array:
    """bfloat16 as uint16 of the same bits; any other array as it is.

    XLA's CPU compiler slices and updates bfloat16 arrays by way of float32: a scan over stacked weights would
    convert all of them at every layer. Integers are moved as they are, and a bitcast is free on every device.

    Raises:
      ValueError: where bfloat16 weights are differentiated, which integers would silently answer with zero.
    """
    return _pack_bfloat16(x) if x.dtype == jnp.bfloat16 else x


@jax.custom_jvp
def _pack_bfloat16(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


@_pack_bfloat16.defjvp
def _refuse_to_differentiate(primals, tangents):
    raise ValueError("compute_dtype must be float32 where the frozen weights are trained, got bfloat16")


def unpack(x: Array) -> Array:
    """The array that was given to `pack`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _keep(x: Array, dtype: DTypeLike) -> Array:
    """`x` as the backward pass will find it: rounded to `dtype`, packed."""
    return pack(x.astype(dtype))


def _kept(x: Array) -> Array:
    """What `_keep` kept, float32."""
    return unpack(x).astype(jnp.float32)


def _dot(x: Array, y: Array, spec: str, dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


@jax.custom_vjp
def project(x: Array, w: Array, factors: Factors | None = None) -> Array:
    """`x @ w + (x @ a) @ b`: a frozen projection and its adapter.

    All products multiply in the dtype of `w` and are summed in float32; what they add up to has the dtype of x.

    Args:
      x: `[..., n_in]`, float32, or bfloat16 where w is.
      w: `[n_in, n_out]`, as it is or packed.
      factors: effective ones of one layer, `a: [n_in, R]`, `b: [R, n_out]`, float32; None for no adapter.

    Returns:
      `[..., n_out]`, of the dtype of x.
    """
    return _project_forward(x, w, factors)[0]


def _project_forward(x: Array, w: Array, factors: Factors | None) -> tuple[Array, tuple]:
    frozen = unpack(w)
    dtype, between = frozen.dtype, x.dtype
    x = x.astype(dtype)
    y = _dot(x, frozen, "...i,io->...o", between)
    if factors is None:
        return y, (pack(x), w, None, None)
    narrow = _dot(x, factors.a.astype(dtype), "...i,ir->...r").astype(dtype)
    y += _dot(narrow, factors.b.astype(dtype), "...r,ro->...o", between)
    return y, (pack(x), w, factors, pack(narrow))


def _project_backward(residuals: tuple, g: Array) -> tuple[Array, Array | None, Factors | None]:
    x, w, factors, narrow = residuals
    x, frozen = unpack(x), unpack(w)
    dtype, between = frozen.dtype, g.dtype
    g = g.astype(dtype)
    dx = _dot(g, frozen, "...o,io->...i", between)
    dw = None if w.dtype == jnp.uint16 else _dot(x, g, "...i,...o->io").astype(w.dtype)
    if factors is None:
        return dx, dw, None
    g_narrow = _dot(g, factors.b.astype(dtype), "...o,ro->...r").astype(dtype)
    # The narrow operand first: the other order transposes the wide one. Without the barrier XLA restores it.
    da = lax.optimization_barrier(_dot(g_narrow, x, "...r,...i->ri")).T
    db = _dot(unpack(narrow), g, "...r,...o->ro")
    return dx + _dot(g_narrow, factors.a.astype(dtype), "...r,ir->...i", between), dw, Factors(a=da, b=db)


project.defvjp(_project_forward, _project_backward)


def gelu(x: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Gaussian error linear unit, `x * Phi(x)` with the exact normal distribution Phi.

    Args:
      x: any shape.
      dtype: in which the slope is kept for the backward pass.
    """
    return _gelu(x, dtype)


def _normal_cdf(x: Array) -> Array:
    # jax.nn.gelu goes through erfc, which takes twice as long as erf.
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    between, x = x.dtype, x.astype(jnp.float32)
    cdf = _normal_cdf(x)
    slope = cdf + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (x * cdf).astype(between), _keep(slope, dtype)


def _gelu_backward(dtype: DTypeLike, slope: Array, g: Array) -> tuple[Array]:
    del dtype
    return ((g * _kept(slope)).astype(g.dtype),)


_gelu = jax.custom_vjp(lambda *arguments: _gelu_forward(*arguments)[0], nondiff_argnums=(1,))
_gelu.defvjp(_gelu_forward, _gelu_backward)


def layer_norm(x: Array, scale_bias: tuple[Array, Array], eps: float, dtype: DTypeLike = jnp.float32) -> Array:
    """Layer normalisation over the last axis.

    Args:
      x: `[..., d]`.
      scale_bias: `[d]` each.
      eps: added to the variance.
      dtype: in which the normalised values are kept for the backward pass.
    """
    return _layer_norm(x, scale_bias, eps, dtype)


def _layer_norm_forward(x: Array, scale_bias: tuple[Array, Array], eps: float, dtype: DTypeLike) -> tuple[Array, tuple]:
    scale, bias = scale_bias
    between, x = x.dtype, x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    normed = centred * inverse
    return (normed * scale + bias).astype(between), (_keep(normed, dtype), inverse, scale)


def _layer_norm_backward(eps: float, dtype: DTypeLike, residuals: tuple[Array, Array, Array], g: Array):
    del eps, dtype
    normed, inverse, scale = residuals
    normed, between, g = _kept(normed), g.dtype, g.astype(jnp.float32)
    batch_axes = tuple(range(g.ndim - 1))
    scaled = g * scale
    dx = scaled - scaled.mean(-1, keepdims=True) - normed * (scaled * normed).mean(-1, keepdims=True)
    return (dx * inverse).astype(between), ((g * normed).sum(batch_axes), g.sum(batch_axes))


_layer_norm = jax.custom_vjp(lambda *arguments: _layer_norm_forward(*arguments)[0], nondiff_argnums=(2, 3))
_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm(x: Array, scale: Array, eps: float, dtype: DTypeLike = jnp.float32) -> Array:
    """Normalisation by the root of the mean square over the last axis.

    Args:
      x: `[..., d]`.
      scale: the last axes of x, `[d]` or more.
      eps: added to the mean square.
      dtype: in which the normalised values are kept for the backward pass.
    """
    return _rms_norm(x, scale, eps, dtype)


def _rms_norm_forward(x: Array, scale: Array, eps: float, dtype: DTypeLike) -> tuple[Array, tuple]:
    between, x = x.dtype, x.astype(jnp.float32)
    inverse = lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    normed = x * inverse
    return (normed * scale).astype(between), (_keep(normed, dtype), inverse, scale)


def _rms_norm_backward(eps: float, dtype: DTypeLike, residuals: tuple[Array, Array, Array], g: Array):
    del eps, dtype
    normed, inverse, scale = residuals
    normed, between, g = _kept(normed), g.dtype, g.astype(jnp.float32)
    scaled = g * scale
    dx = scaled - normed * (scaled * normed).mean(-1, keepdims=True)
    return (dx * inverse).astype(between), (g * normed).sum(tuple(range(g.ndim - scale.ndim)))


_rms_norm = jax.custom_vjp(lambda *arguments: _rms_norm_forward(*arguments)[0], nondiff_argnums=(2, 3))
_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def gated(x: Array, activation: Callable[[Array], Array], dtype: DTypeLike = jnp.float32) -> Array:
    """`activation(gate) * up` (Shazeer, arXiv 2002.05202), which the backward pass computes again.

    Args:
      x: `[..., 2 * d]` gate and up side by side.
      activation: of each element.
      dtype: in which x is kept for the backward pass.

    Returns:
      `[..., d]`.
    """
    return _gated(x, activation, dtype)


def _gate_times_up(x: Array, activation: Callable[[Array], Array]) -> Array:
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (activation(gate) * up).astype(x.dtype)


def _gated_backward(activation: Callable[[Array], Array], dtype: DTypeLike, kept: Array, g: Array) -> tuple[Array]:
    del dtype
    x = _kept(kept).astype(g.dtype)
    return jax.vjp(lambda x: _gate_times_up(x, activation), x)[1](g)


_gated = jax.custom_vjp(lambda x, activation, dtype: _gate_times_up(x, activation), nondiff_argnums=(1, 2))
_gated.defvjp(lambda x, activation, dtype: (_gate_times_up(x, activation), _keep(x, dtype)), _gated_backward)


def rotary(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Heads turned by their position: the pair of elements i and D / 2 + i by the i-th of the angles.

    Args:
      x: `[G, P, H, D]`.
      rotation: cosine and sine of the angles, `[P, D / 2]` or `[G, P, D / 2]` each.
    """
    cos, sin = (part[..., None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(
    qkv: Array,
    mask: Array,
    num_heads: int,
    dtype: DTypeLike,
    example: Array | None = None,
    *,
    num_kv_heads: int | None = None,
    causal: bool = False,
) -> Array:
    """Softmax attention in which no position looks at padding, or at another example.

    Args:
      qkv: `[G, P, (H + 2 * K) * D]` queries of H heads, keys and values of K heads, side by side.
      mask: `[G, P]` 1 for a real position.
      num_heads: H.
      dtype: in which the products multiply; sums and softmax are float32.
      example: `[G, P]` number of the example that each position is of; None where each row is of one.
      num_kv_heads: K, which divides H: H / K heads of queries in turn share one of keys and values; None for H.
      causal: whether a position looks at none after it.

    Returns:
      `[G, P, H * D]`; the mean of the row's values where a position has none to look at.
    """
    return _attention(qkv, mask, example, (num_heads, num_kv_heads or num_heads), dtype, causal)


def _attention_forward(
    qkv: Array, mask: Array, example: Array | None, heads: tuple[int, int], dtype: DTypeLike, causal: bool
) -> tuple[Array, tuple]:
    (batch, length, _), (num_heads, num_kv) = qkv.shape, heads
    parts = jnp.split(qkv.reshape(batch, length, num_heads + 2 * num_kv, -1), (num_heads, num_heads + num_kv), axis=2)
    query, key, value = (part.transpose(0, 2, 1, 3).astype(dtype) for part in parts)
    query = query.reshape(batch, num_kv, -1, query.shape[-1])  # the heads that share keys one after another
    scores = _dot(query, key, "bhqd,bhkd->bhqk") * query.shape[-1] ** -0.5
    seen = mask[:, None, None, :] > 0
    if example is not None:
        seen &= (example[:, :, None] == example[:, None, :])[:, None]
    if causal:
        seen &= jnp.tri(length, dtype=bool)
    scores = jnp.where(seen, scores.reshape(batch, num_heads, length, length), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype).reshape(batch, num_kv, -1, length)
    mixed = _dot(weights, value, "bhqk,bhkd->bhqd")
    residuals = (*map(pack, (query, key, value, weights, mixed.astype(dtype))), mask)
    mixed = mixed.reshape(batch, num_heads, length, -1).transpose(0, 2, 1, 3)
    return mixed.reshape(batch, length, -1).astype(qkv.dtype), residuals


def _attention_backward(
    heads: tuple[int, int], dtype: DTypeLike, causal: bool, residuals: tuple, g: Array
) -> tuple[Array, Array, None]:
    del causal  # it is in the weights
    query, key, value, weights, mixed, mask = map(unpack, residuals)
    batch, length, _ = g.shape
    by_head, between = (batch, heads[0], length, query.shape[-1]), g.dtype
    g = g.reshape(batch, length, heads[0], -1).transpose(0, 2, 1, 3).astype(dtype).reshape(query.shape)
    dweights = _dot(g, value, "bhqd,bhkd->bhqk")
    # The sum of weights * dweights over the keys, from D terms instead of S.
    along = (g.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1, keepdims=True)
    dscores = (weights.astype(jnp.float32) * (dweights - along) * query.shape[-1] ** -0.5).astype(dtype)
    dquery = _dot(dscores, key, "bhqk,bhkd->bhqd").reshape(by_head)
    dkey, dvalue = _summed_over_queries(query, dscores), _summed_over_queries(g, weights)
    parts = (dquery.transpose(0, 2, 1, 3), dkey.transpose(0, 3, 1, 2), dvalue.transpose(0, 3, 1, 2))
    dqkv = jnp.concatenate([part.astype(dtype) for part in parts], axis=2).reshape(batch, length, -1)
    return dqkv.astype(between), jnp.zeros_like(mask), None


def _summed_over_queries(x: Array, y: Array) -> Array:
    """`[B, H, Q, d]` with `[B, H, Q, S]` -> `[B, H, d, S]`; the large operand is used as it lies in memory."""
    return _dot(lax.optimization_barrier(x.swapaxes(2, 3)), y, "bhdq,bhqk->bhdk")


_attention = jax.custom_vjp(lambda *arguments: _attention_forward(*arguments)[0], nondiff_argnums=(3, 4, 5))
_attention.defvjp(_attention_forward, _attention_backward)
