"""SOFT with exact orthogonality: each factor's change is rotated so that its components are orthogonal.

Ours. The top k eigenvectors V_a of the R x R Gram matrix of a client's change `da`, and V_b of that of `db`, are
sent beside the rotated changes `da V_a` and `V_b^T db`; the server turns both back into its own basis. The rotated
components are orthogonal and sorted by norm, so that keeping the first k is the best choice for each factor
(Eckart-Young). Every rank of the broadcast is updated, and no rule for missing ranks is needed. Neither a product
of the factors nor its singular value decomposition is formed.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
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
        for name, (of_a, of_b) in _principal(start, trained, rank_mask).items():
            old = start.modules[name]
            modules[name] = Factors(
                a=old.a + _best(of_a, kept, rank_mask),
                b=old.b + jnp.swapaxes(_best(of_b, kept, rank_mask), -1, -2),
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
        found = jax.tree.leaves(_principal(start, trained, rank_mask), is_leaf=lambda x: isinstance(x, _Principal))
        energies = jnp.sum(jnp.concatenate([part.energies for part in found]), axis=0)
        return ranks.tails(energies)

    return Sparsifier(
        init=lambda adapters: (),
        penalty=lambda adapters, rank_mask: jnp.zeros(()),
        tail_energy=tail_energy,
        payload_bits=lambda keep_ratio, rank_mask: bits(ranks.num_kept(keep_ratio, rank_mask)).astype(jnp.float32),
        compress=compress,
    )


class _Principal(NamedTuple):
    """A factor's change with the ranks as columns, and its orthogonal components, largest first.

    change: `[L, n, R]`, 0 in unused ranks. energies: `[L, R]`. rotation: `[L, R, R]`, the components as columns.
    """

    change: Array
    energies: Array
    rotation: Array


def _principal(start: Adapters, trained: Adapters, rank_mask: Array) -> dict[str, tuple[_Principal, _Principal]]:
    """Components of the changes of both factors, by module."""
    changes = {}
    for name, new in trained.modules.items():
        old = start.modules[name]
        changes[name] = ((new.a - old.a) * rank_mask, jnp.swapaxes(new.b - old.b, -1, -2) * rank_mask)
    flat, structure = jax.tree.flatten(changes)
    grams = jnp.concatenate([gram(change) for change in flat])
    energy = jnp.trace(grams, axis1=-2, axis2=-1)[:, None]
    # At unit trace, accuracy is the same at every scale of the change. Unused ranks move from eigenvalue 0 to -1:
    # they come last even if a rank in use has not changed.
    scaled = grams / jnp.where(energy > 0, energy, 1.0)[..., None] - jnp.diag(1.0 - rank_mask)
    # One call for all matrices: several side by side can starve XLA's CPU threads.
    values, vectors = jnp.linalg.eigh(scaled)
    energies, rotations = jnp.maximum(values[:, ::-1], 0.0) * energy, vectors[..., ::-1]
    ends = list(itertools.accumulate(change.shape[0] for change in flat))[:-1]
    parts = zip(flat, jnp.split(energies, ends), jnp.split(rotations, ends), strict=True)
    return jax.tree.unflatten(structure, [_Principal(*part) for part in parts])


def _best(part: _Principal, kept: Array, rank_mask: Array) -> Array:
    """The best approximation of rank `kept` of a change, `[L, n, R]`, as the receiver rebuilds it."""
    rotation = part.rotation * (jnp.arange(rank_mask.shape[-1]) < kept)
    # Products in full float32: what is sent and turned back must be the change, not a bfloat16 copy of it.
    rotated = jnp.matmul(part.change, rotation, precision="highest")
    return jnp.matmul(rotated, jnp.swapaxes(rotation, -1, -2), precision="highest") * rank_mask
