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

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.ops import factorise
from fedjax_lora.ops.products import gram
from fedjax_lora.sparsifiers import diagnostics, payload, ranks
from fedjax_lora.sparsifiers.ranks import Budget
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, arriving


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftRotatedConfig(Options):
    """Rotated changes; exact, hence without a regulariser to weigh.

    budget: keep k components of each factor of each `module` and layer, or as many in all, chosen by energy over
      the whole adapter (`global`).
    keep_norm: scale what is sent of each factor up to the norm of its whole change. The best approximation is shorter
      than what it stands for, and so are the steps of the average; this gives up its least error for their length.
    """

    orthogonality: ClassVar[float] = 0.0
    name: Literal["soft_rotated"] = "soft_rotated"
    budget: Budget = "module"
    keep_norm: bool = False


def make(config: SoftRotatedConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of rotated changes.

    A component of a factor costs its own width and r values for its row of the rotation, which is zero in ranks that
    are not in use. Beside them each factor of each matrix is sent with its number of components where the budget is
    global, and with a scale to keep its norm. Tail energy: what is left out of `||da||_F^2 + ||db||_F^2`, so in units
    of a factor squared, while that of `soft` is in units of the factors' product squared.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the rotated changes travel; the rotations travel in full.
    """
    max_rank, num_matrices = ranks.max_rank(like), ranks.num_matrices(like)
    payload.check_fits(like, 2 * max_rank)
    side_bits = max_rank.bit_length() * (config.budget == "global") + FLOAT32.bits_per_value * config.keep_norm

    def bits(kept: dict[str, tuple[Array, Array]], scope: Scope) -> Array:
        factors = num_matrices * (scope.a + scope.b).astype(jnp.uint32)
        parts = [_bits(like.modules[name], counts, scope, wire) for name, counts in kept.items()]
        return sum(parts, payload.common_bits(like, scope, wire) + factors * jnp.uint32(side_bits))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        head_key, key = jax.random.split(key)
        found, modules = _principal(start, trained, scope.ranks), {}
        kept = _counts(config.budget, found, ranks.num_kept(keep_ratio, scope.ranks), scope.ranks)
        for (name, pair), part in zip(found.items(), jax.random.split(key, len(found)), strict=True):
            of_a, of_b = (
                _best(*of, scope.ranks, wire, config.keep_norm)
                for of in zip(pair, kept[name], jax.random.split(part), strict=True)
            )
            old = start.modules[name]
            modules[name] = Factors(a=old.a + of_a, b=old.b + jnp.swapaxes(of_b, -1, -2))
        heads = arriving(wire, Adapters({}, trained.head), Adapters({}, start.head), head_key)
        decoded = scope.select(Adapters(modules=modules, head=heads.head), start)
        in_use = ranks.everywhere(scope.ranks, like)
        sent = Sent(
            adapters=decoded,
            counted=in_use,
            bits=bits({name: (jnp.sum(a), jnp.sum(b)) for name, (a, b) in kept.items()}, scope),
            kept_ranks=sum((jnp.sum(a + b) for a, b in kept.values()), jnp.uint32(0)) / (2.0 * num_matrices),
            dropped_energy=diagnostics.difference_energy(trained, decoded, in_use),
        )
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        found = _principal(start, trained, scope.ranks).values()
        pools = [jnp.concatenate([pair[factor].energies for pair in found]) for factor in (0, 1)]
        return ranks.tail_energy(pools[0], config.budget) + ranks.tail_energy(pools[1], config.budget)

    def payload_bits(keep_ratio: Array, scope: Scope) -> Array:
        kept, rank = ranks.num_kept(keep_ratio, scope.ranks), jnp.sum(scope.ranks).astype(jnp.uint32)
        if config.budget == "module":
            counts = {name: (kept * f.a.shape[0], kept * f.a.shape[0]) for name, f in like.modules.items()}
        else:
            counts = _widest_first(like, kept * num_matrices, rank)
        return bits(counts, scope).astype(jnp.float32)

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=payload_bits,
        compress=compress,
    )


def _bits(like: Factors, counts: tuple[Array, Array], scope: Scope, wire: Wire) -> Array:
    """uint32 bits of so many components (uint32, over all layers) of either factor of a module."""
    bits, rotation_bits = jnp.uint32(0), FLOAT32.bits_per_value * jnp.sum(scope.ranks).astype(jnp.uint32)
    for count, width, part in zip(counts, (like.a.shape[-2], like.b.shape[-1]), (scope.a, scope.b), strict=True):
        bits += part.astype(jnp.uint32) * count * (jnp.uint32(wire.bits_per_value * width) + rotation_bits)
    return bits


def _counts(budget: Budget, found: dict[str, "_Pair"], kept: Array, rank_mask: Array) -> dict[str, tuple[Array, Array]]:
    """`[L]` components of either factor to keep, uint32, by module; never more than there are ranks in use."""
    if budget == "module":
        every = {name: jnp.full(pair[0].energies.shape[0], kept) for name, pair in found.items()}
        return {name: (count, count) for name, count in every.items()}
    num_matrices = sum(pair[0].energies.shape[0] for pair in found.values())
    exists = jnp.arange(rank_mask.shape[0]) < jnp.sum(rank_mask)
    masks = [
        ranks.largest_overall(
            {name: jnp.where(exists, pair[factor].energies, -1.0) for name, pair in found.items()}, kept * num_matrices
        )
        for factor in (0, 1)
    ]
    of_a, of_b = ({name: jnp.sum(m, -1).astype(jnp.uint32) for name, m in mask.items()} for mask in masks)
    return {name: (of_a[name], of_b[name]) for name in found}


def _widest_first(like: Adapters, budget: Array, rank: Array) -> dict[str, tuple[Array, Array]]:
    """Components of either factor, by module, where `budget` of each factor cost the most: the widest first."""
    counts: list[dict[str, Array]] = []
    for width in (lambda f: f.a.shape[-2], lambda f: f.b.shape[-1]):
        left, found = budget, {}
        for name in sorted(like.modules, key=lambda name: width(like.modules[name]), reverse=True):
            found[name] = jnp.minimum(left, rank * like.modules[name].a.shape[0])
            left = left - found[name]
        counts.append(found)
    return {name: (counts[0][name], counts[1][name]) for name in like.modules}


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
    values, vectors = factorise.eigh(scaled)
    energies, rotations = jnp.maximum(values[:, ::-1], 0.0) * energy, vectors[..., ::-1]
    ends = list(itertools.accumulate(change.shape[0] for change in flat))[:-1]
    parts = zip(flat, jnp.split(energies, ends), jnp.split(rotations, ends), strict=True)
    return jax.tree.unflatten(structure, [_Principal(*part) for part in parts])


def _best(part: _Principal, kept: Array, key: Array, rank_mask: Array, wire: Wire, keep_norm: bool) -> Array:
    """The best approximation of rank `kept` (`[L]`) of a change, `[L, n, R]`, as the receiver rebuilds it."""
    chosen = jnp.arange(rank_mask.shape[-1]) < kept[:, None]
    rotation = part.rotation * chosen[:, None, :]
    # Products in full float32: what is sent and turned back must be the change, not a bfloat16 copy of it.
    rotated = wire.encode(jnp.matmul(part.change, rotation, precision="highest"), key)
    rebuilt = jnp.matmul(rotated, jnp.swapaxes(rotation, -1, -2), precision="highest") * rank_mask
    if not keep_norm:
        return rebuilt
    whole, sent = jnp.sum(part.energies, -1), jnp.sum(part.energies * chosen, -1)
    return rebuilt * jnp.sqrt(whole / jnp.where(sent > 0, sent, 1.0))[:, None, None]
