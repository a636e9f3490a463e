"""SOFT with exact orthogonality: each factor's change is rotated so that its components are orthogonal.

Ours. The top k eigenvectors V_a of the R x R Gram matrix of a client's change `da`, and V_b of that of `db`, are
sent beside the rotated changes `da V_a` and `V_b^T db`; the server turns both back into its own basis. The rotated
components are orthogonal and sorted by norm, so that keeping the first k is the best choice for each factor
(Eckart-Young). Every rank of the broadcast is updated, and no rule for missing ranks is needed. Neither a product
of the factors nor its singular value decomposition is formed.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.base import Adapters, Factors, Sent, Sparsifier
from fedjax_lora.ops.products import gram
from fedjax_lora.sparsifiers import diagnostics, payload, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftRotatedConfig:
    """Rotated changes; exact, hence without a regulariser to weigh."""

    orthogonality: ClassVar[float] = 0.0
    name: Literal["soft_rotated"] = "soft_rotated"

    def __post_init__(self) -> None:
        if self.name != "soft_rotated":
            raise ValueError(f"name must be 'soft_rotated', got {self.name!r}")


def make(config: SoftRotatedConfig, like: Adapters) -> Sparsifier:
    """The sparsifier of rotated changes.

    Payload of a matrix: `k (n_in + n_out) + 2 k R` values of 32 bits; there is no index. Tail energy: what is
    left out of `||da||_F^2 + ||db||_F^2`, so in units of a factor squared, while that of `soft` is in units of the
    factors' product squared.

    Args:
      config: its options.
      like: adapters, or their shapes.
    """
    del config  # it has no option yet, but every method is made in the same way
    max_rank = ranks.max_rank(like)
    rotation_values = 2 * max_rank
    payload.check_fits(like, rotation_values)

    def bits(kept: Array) -> Array:
        parts = [
            payload.component_bits(kept * factors.a.shape[0], factors, rotation_values)
            for factors in like.modules.values()
        ]
        return sum(parts, jnp.uint32(payload.head_bits(like)))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, rank_mask: Array, key: Array
    ) -> tuple[Sent, Any]:
        del key
        kept, modules = ranks.num_kept(keep_ratio, rank_mask), {}
        for name, new in trained.modules.items():
            old = start.modules[name]
            change_a, change_b = _changes(new, old, rank_mask)
            modules[name] = Factors(
                a=old.a + _best(change_a, kept, rank_mask),
                b=old.b + jnp.swapaxes(_best(change_b, kept, rank_mask), -1, -2),
            )
        decoded = Adapters(modules=modules, head=trained.head)
        in_use = ranks.everywhere(rank_mask, like)
        sent = Sent(
            adapters=decoded,
            counted=in_use,
            bits=bits(kept),
            kept_ranks=kept.astype(jnp.float32),
            dropped_energy=diagnostics.difference_energy(trained, decoded, in_use),
        )
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, rank_mask: Array) -> Array:
        energies = jnp.zeros(max_rank)
        for name, new in trained.modules.items():
            for change in _changes(new, start.modules[name], rank_mask):
                values, _ = _principal(change, rank_mask)
                energies += jnp.sum(values.reshape(-1, max_rank), axis=0)
        return ranks.tails(energies)

    return Sparsifier(
        init=lambda adapters: (),
        penalty=lambda adapters, rank_mask: jnp.zeros(()),
        tail_energy=tail_energy,
        payload_bits=lambda keep_ratio, rank_mask: bits(ranks.num_kept(keep_ratio, rank_mask)).astype(jnp.float32),
        compress=compress,
    )


def _changes(new: Factors, old: Factors, rank_mask: Array) -> tuple[Array, Array]:
    """Changes of both factors with the ranks as columns, `[L, n_in, R]` and `[L, n_out, R]`; 0 in unused ranks."""
    return (new.a - old.a) * rank_mask, jnp.swapaxes(new.b - old.b, -1, -2) * rank_mask


def _principal(change: Array, rank_mask: Array) -> tuple[Array, Array]:
    """Energies `[..., R]` of the rotated components, largest first, and the rotation `[..., R, R]` as columns."""
    products = gram(change)
    energy = jnp.trace(products, axis1=-2, axis2=-1)[..., None]
    # At unit trace, accuracy is the same at every scale of the change. Unused ranks move from eigenvalue 0 to -1:
    # they come last even if a rank in use has not changed.
    scaled = products / jnp.where(energy > 0, energy, 1.0)[..., None] - jnp.diag(1.0 - rank_mask)
    values, vectors = jnp.linalg.eigh(scaled)
    return jnp.maximum(values[..., ::-1], 0.0) * energy, vectors[..., ::-1]


def _best(change: Array, kept: Array, rank_mask: Array) -> Array:
    """The best approximation of rank `kept` of `change` `[..., n, R]`, as the receiver rebuilds it."""
    _, rotation = _principal(change, rank_mask)
    rotation = rotation * (jnp.arange(rank_mask.shape[-1]) < kept)
    # Products in full float32: what is sent and turned back must be the change, not a bfloat16 copy of it.
    rotated = jnp.matmul(change, rotation, precision="highest")
    return jnp.matmul(rotated, jnp.swapaxes(rotation, -1, -2), precision="highest") * rank_mask
