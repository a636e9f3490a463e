"""What sparsification leaves out, and how far rank components are from orthogonal: exact, from Gram matrices."""

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.types import Adapters
from fedjax_lora.ops.products import gram, product_energy


def dropped_energy(adapters: Adapters, drop: dict[str, Array]) -> Array:
    """`||sum of dropped a_i b_i||_F^2`, summed over modules and layers, without the scale s.

    Args:
      adapters: the full adapters.
      drop: module name -> `[L, R]`, 1 where a component is left out.
    """
    energies = [
        jnp.sum(product_energy(factors.a * drop[name][..., None, :], factors.b))
        for name, factors in adapters.modules.items()
    ]
    return jnp.sum(jnp.stack(energies))


def difference_energy(adapters: Adapters, others: Adapters, mask: dict[str, Array]) -> Array:
    """`||sum of a_i b_i - a'_i b'_i||_F^2` over the masked components, summed over modules and layers.

    The difference is formed as `(a - a') b + a' (b - b')`: it vanishes exactly where the factors agree, and a
    small one is not lost between two large products.

    Args:
      adapters: one side, with factors a and b.
      others: the other side, a' and b'.
      mask: module name -> `[L, R]`, 1 for the components to compare.
    """
    energies = []
    for name, x in adapters.modules.items():
        y, keep = others.modules[name], mask[name][..., None, :]
        u = jnp.concatenate([(x.a - y.a) * keep, y.a * keep], axis=-1)
        v = jnp.concatenate([x.b, x.b - y.b], axis=-2)
        energies.append(jnp.sum(product_energy(u, v)))
    return jnp.sum(jnp.stack(energies))


def orthogonality(adapters: Adapters, rank_mask: Array) -> Array:
    """Largest |cosine| between two rank components of any module and layer; 0 where one of the two is zero.

    The cosine of components i and j, as matrices, is `(a_i . a_j) (b_i . b_j) / (sigma_i sigma_j)`.

    Args:
      adapters: the adapters.
      rank_mask: `[R]`, 1 for the ranks in use.
    """
    others = 1.0 - jnp.eye(rank_mask.shape[-1])
    largest = []
    for factors in adapters.modules.values():
        cosine_a = gram(_unit_columns(factors.a * rank_mask))
        cosine_b = gram(_unit_columns(jnp.swapaxes(factors.b, -1, -2) * rank_mask))
        largest.append(jnp.max(jnp.abs(cosine_a * cosine_b) * others))
    return jnp.minimum(jnp.max(jnp.stack(largest)), 1.0)


def _unit_columns(x: Array) -> Array:
    """Columns of x `[..., n, m]` at norm 1, or 0 where they are zero."""
    # Scaled by the largest entry first: squares of a factor that has only begun to train may underflow.
    peak = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x / jnp.where(peak > 0, peak, 1.0)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)
