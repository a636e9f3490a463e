"""What separates the server's product of averages from the ideal average of products, as norms.

With weights p_k of the clients and w_ki of client k in component i, decoded factors a~, b~, trained factors a, b,
and averages `abar_i = sum_k w_ki a~_ki`, `bbar_i` likewise, it holds exactly that

    sum_k p_k a_k b_k = abar bbar + Cov + E_s,
    Cov = sum_k,i w_ki (a~_ki - abar_i) (b~_ki - bbar_i),
    E_s = sum_k (p_k a_k b_k - sum_i w_ki a~_ki b~_ki).

Either is a sum over the clients of `[n_in, n_out]` matrices. The functions take one layer of one module, to bound the
memory.

Of a server that does not average the factors apart, or merges a product m into the frozen weights, the same question
is what `sum_k p_k a~_k b~_k - (a b + m)` is, with whatever factors a, b it goes on with.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from fedjax_lora.core.exchange import Scale
from fedjax_lora.core.types import Factors


def scale_of(scale: Scale, name: str) -> Array:
    """The scale of a module's products: of all its layers, or `[L]`."""
    return jnp.asarray(scale[name] if isinstance(scale, Mapping) else scale)


def sparsification_energy(trained: Factors, decoded: Factors, weights: Array, component_weights: Array) -> Array:
    """`||E_s||_F^2` of one layer, without the scale s.

    Args:
      trained: what the clients hold, a `[C, n_in, R]` and b `[C, R, n_out]`.
      decoded: the server's copies.
      weights: `[C]`, p_k.
      component_weights: `[C, R]`, w_ki.
    """
    p, w = weights[:, None, None], component_weights[:, :, None]
    # p a b - w a~ b~ as p (a - a~) b + a~ (p b - w b~): no difference of two large products is taken.
    u = jnp.concatenate([p * (trained.a - decoded.a), decoded.a], axis=-1)
    v = jnp.concatenate([trained.b, p * trained.b - w * decoded.b], axis=-2)
    return _stacked_energy(u, v)


def covariance_energy(decoded: Factors, average: Factors, component_weights: Array) -> Array:
    """`||Cov||_F^2` of one layer, without the scale s.

    Args:
      decoded: the server's copies, a `[C, n_in, R]` and b `[C, R, n_out]`.
      average: their average, a `[n_in, R]` and b `[R, n_out]`.
      component_weights: `[C, R]`, w_ki.
    """
    w = component_weights[:, None, :]
    return _stacked_energy(w * (decoded.a - average.a), decoded.b - average.b)


def product_gap(received: Factors, server: Factors, weights: Array) -> Array:
    """`sum_k p_k a_k b_k - a b` of one layer, `[n_in, n_out]`; 0 where all weights are.

    Args:
      received: the server's copies, a `[C, n_in, R]` and b `[C, R, n_out]`.
      server: its own factors, a `[n_in, R]` and b `[R, n_out]`.
      weights: `[C]`, p_k, that sum to 1 or are all 0.
    """
    # As sum p (a_k - a) b_k + a sum p (b_k - b): no difference of two large products is taken.
    p = weights[:, None, None]
    of_a = jnp.einsum("cir,cro->io", p * (received.a - server.a), received.b, precision=Precision.HIGHEST)
    of_b = jnp.sum(p * (received.b - server.b), axis=0)
    return of_a + jnp.matmul(server.a, of_b, precision=Precision.HIGHEST)


def averaging_energy(received: Factors, server: Factors, merged: Array | None, weights: Array) -> Array:
    """`||sum_k p_k a_k b_k - (a b + merged)||_F^2` of one layer, without the scale s; 0 where all weights are.

    Args:
      received, server, weights: see `product_gap`.
      merged: `[n_in, n_out]`, what the server merges into the frozen weights, or None.
    """
    gap = product_gap(received, server, weights)
    return jnp.sum((gap if merged is None else gap - merged) ** 2)


def _stacked_energy(u: Array, v: Array) -> Array:
    """`||sum over clients of u v||_F^2` for u `[C, n_in, m]` and v `[C, m, n_out]`.

    The sum is formed, not the Gram matrices of the stack: devices that share the clients add up their sums, where Gram
    matrices would need the factors of all clients on each.
    """
    return jnp.sum(jnp.einsum("cim,cmo->io", u, v, precision=Precision.HIGHEST) ** 2)
