"""SOFT with exact orthogonality: each factor's change is rotated so that its components are orthogonal.

Ours. The top k eigenvectors V_a of the R x R Gram matrix of a client's change `da`, and V_b of that of `db`, are
sent beside the rotated changes `da V_a` and `V_b^T db`; the server turns both back into its own basis. The rotated
components are orthogonal and sorted by norm, so that keeping the first k is the best choice for each factor
(Eckart-Young). Every rank of the broadcast is updated, and no rule for missing ranks is needed. Neither a product
of the factors nor its singular value decomposition is formed.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.base import Adapters, Factors, Sent, Sparsifier
from fedjax_lora.ops.products import gram
from fedjax_lora.sparsifiers import diagnostics, payload, ranks

Budget = Literal["module", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftRotatedConfig:
    """Rotated changes; exact, hence without a regulariser to weigh.

    budget: keep k components of each factor of each `module` and layer, or as many in all, chosen by energy over
      the whole adapter (`global`).
    """

    orthogonality: ClassVar[float] = 0.0
    name: Literal["soft_rotated"] = "soft_rotated"
    budget: Budget = "module"

    def __post_init__(self) -> None:
        if self.name != "soft_rotated":
            raise ValueError(f"name must be 'soft_rotated', got {self.name!r}")
        if self.budget not in get_args(Budget):
            raise ValueError(f"budget must be one of {', '.join(get_args(Budget))}, got {self.budget!r}")


def make(config: SoftRotatedConfig, like: Adapters) -> Sparsifier:
    """The sparsifier of rotated changes.

    A component of a factor costs its own width and R values of 32 bits for its row of the rotation; with the global
    budget each factor of each matrix is sent with its number of components. Tail energy: what is left out of
    `||da||_F^2 + ||db||_F^2`, so in units of a factor squared, while that of `soft` is in units of the factors'
    product squared.

    Args:
      config: its options.
      like: adapters, or their shapes.
    """
    max_rank, num_matrices = ranks.max_rank(like), ranks.num_matrices(like)
    payload.check_fits(like, 2 * max_rank)
    overall = config.budget == "global"
    fixed_bits = payload.head_bits(like) + (2 * num_matrices * max_rank.bit_length() if overall else 0)

    def counts(found: dict[str, _Pair], kept: Array) -> dict[str, tuple[Array, Array]]:
        """`[L]` components of either factor to keep, by module."""
        if not overall:
            return {name: (jnp.full(like.modules[name].a.shape[0], kept),) * 2 for name in found}
        masks = [
            ranks.largest_overall({name: pair[factor].energies for name, pair in found.items()}, kept * num_matrices)
            for factor in (0, 1)
        ]
        return {name: tuple(jnp.sum(mask[name], -1).astype(jnp.uint32) for mask in masks) for name in found}

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, rank_mask: Array, key: Array
    ) -> tuple[Sent, Any]:
        del key
        found, modules = _principal(start, trained, rank_mask), {}
        kept = counts(found, ranks.num_kept(keep_ratio, rank_mask))
        for name, (of_a, of_b) in found.items():
            old, (kept_a, kept_b) = start.modules[name], kept[name]
            modules[name] = Factors(
                a=old.a + _best(of_a, kept_a, rank_mask),
                b=old.b + jnp.swapaxes(_best(of_b, kept_b, rank_mask), -1, -2),
            )
        decoded = Adapters(modules=modules, head=trained.head)
        in_use = ranks.everywhere(rank_mask, like)
        sent = Sent(
            adapters=decoded,
            counted=in_use,
            bits=sum(
                (_bits(f, jnp.sum(kept[name][0]), jnp.sum(kept[name][1])) for name, f in like.modules.items()),
                jnp.uint32(fixed_bits),
            ),
            kept_ranks=sum((jnp.sum(a + b) for a, b in kept.values()), jnp.uint32(0)) / (2.0 * num_matrices),
            dropped_energy=diagnostics.difference_energy(trained, decoded, in_use),
        )
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, rank_mask: Array) -> Array:
        found = _principal(start, trained, rank_mask)
        pools = [jnp.concatenate([pair[factor].energies for pair in found.values()]) for factor in (0, 1)]
        if overall:
            # Keeping k a matrix keeps the first k * num_matrices of each pool: one column of these.
            pools = [jnp.sort(pool.ravel(), descending=True).reshape(max_rank, num_matrices).T for pool in pools]
        return ranks.tails(jnp.sum(jnp.concatenate(pools), axis=0))

    def payload_bits(keep_ratio: Array, rank_mask: Array) -> Array:
        kept, rank = ranks.num_kept(keep_ratio, rank_mask), jnp.sum(rank_mask).astype(jnp.uint32)
        bits = jnp.uint32(fixed_bits)
        if not overall:
            parts = (_bits(f, kept * f.a.shape[0], kept * f.a.shape[0]) for f in like.modules.values())
            return sum(parts, bits).astype(jnp.float32)
        # The most that a choice can cost: the widest first.
        for widths in (
            [(f.a.shape[-2], f) for f in like.modules.values()],
            [(f.b.shape[-1], f) for f in like.modules.values()],
        ):
            left = kept * num_matrices
            for width, f in sorted(widths, key=lambda pair: pair[0], reverse=True):
                count = jnp.minimum(left, rank * f.a.shape[0])
                bits, left = bits + count * jnp.uint32(payload.BITS_PER_VALUE * (width + max_rank)), left - count
        return bits.astype(jnp.float32)

    return Sparsifier(
        init=lambda adapters: (),
        penalty=lambda adapters, rank_mask: jnp.zeros(()),
        tail_energy=tail_energy,
        payload_bits=payload_bits,
        compress=compress,
    )


def _bits(like: Factors, kept_a: Array, kept_b: Array) -> Array:
    """uint32 bits of so many components (uint32) of either factor of a module."""
    of_a, of_b = (payload.BITS_PER_VALUE * (width + like.a.shape[-1]) for width in (like.a.shape[-2], like.b.shape[-1]))
    return kept_a * jnp.uint32(of_a) + kept_b * jnp.uint32(of_b)


class _Principal(NamedTuple):
    """A factor's change with the ranks as columns, and its orthogonal components, largest first.

    change: `[L, n, R]`, 0 in unused ranks. energies: `[L, R]`. rotation: `[L, R, R]`, the components as columns.
    """

    change: Array
    energies: Array
    rotation: Array


_Pair = tuple[_Principal, _Principal]


def _principal(start: Adapters, trained: Adapters, rank_mask: Array) -> dict[str, _Pair]:
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
    """The best approximation of rank `kept` (`[L]`) of a change, `[L, n, R]`, as the receiver rebuilds it."""
    rotation = part.rotation * (jnp.arange(rank_mask.shape[-1]) < kept[:, None])[:, None, :]
    # Products in full float32: what is sent and turned back must be the change, not a bfloat16 copy of it.
    rotated = jnp.matmul(part.change, rotation, precision="highest")
    return jnp.matmul(rotated, jnp.swapaxes(rotation, -1, -2), precision="highest") * rank_mask
