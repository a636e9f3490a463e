"""SOFT with exact orthogonality: each factor's change is rotated so that its components are orthogonal.

Ours. The top k eigenvectors V_a of the R x R Gram matrix of a client's change `da`, and V_b of that of `db`, are
sent beside the rotated changes `da V_a` and `V_b^T db`; the server turns both back into its own basis. The rotated
components are orthogonal and sorted by norm, so that keeping the first k is the best choice for each factor
(Eckart-Young). Every rank of the broadcast is updated, and no rule for missing ranks is needed. Neither a product
of the factors nor its singular value decomposition is formed.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.ops.rotate_ranks import rotate_ranks
from fedjax_lora.sparsifiers import diagnostics, payload, ranks
from fedjax_lora.sparsifiers.ranks import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftRotatedConfig(Options):
    """Rotated changes; exact, hence without a regulariser to weigh.

    budget: keep k components of each factor of each `module` and layer, or as many in all, chosen by energy over
      the whole adapter (`global`).
    keep_norm: scale what is sent of each factor up to the norm of its whole change. The best approximation is shorter
      than what it stands for, and so are the steps of the average; this gives up its least error for their length.
    """

    name: Literal["soft_rotated"] = "soft_rotated"
    budget: Budget = "module"
    keep_norm: bool = False


def make(options: SoftRotatedConfig, context: Context) -> Sparsifier:
    """The sparsifier of rotated changes.

    A component of a factor costs its own width and r values for its row of the rotation, which is zero in ranks that
    are not in use. Beside them each factor of each matrix is sent with its number of components where the budget is
    global, and with a scale to keep its norm; rotations and scales travel in full. Tail energy: what is left out of
    `||da||_F^2 + ||db||_F^2`, so in units of a factor squared, while that of `soft` is in units of the factors' product
    squared.
    """
    like, budget = ranks.shapes(context), options.budget
    max_rank, num_matrices = ranks.max_rank(like), ranks.num_matrices(like)

    def count_bits(scope: Scope) -> Count:
        """Of the number of components of each factor of each matrix."""
        factors = num_matrices * (scope.a + scope.b).astype(jnp.uint32)
        return Count.of(factors * jnp.uint32(max_rank.bit_length() if budget == "global" else 0))

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        found = _principal(start, trained, scope.ranks).values()
        pools = [jnp.concatenate([pair[factor].energies for pair in found]) for factor in (0, 1)]
        tail_energy = ranks.tail_energy(pools[0], budget) + ranks.tail_energy(pools[1], budget)
        kept, rank = ranks.each(scope.ranks), jnp.sum(scope.ranks).astype(jnp.uint32)
        if budget == "module":
            counts = {name: (kept * f.a.shape[0], kept * f.a.shape[0]) for name, f in like.modules.items()}
        else:
            counts = _widest_first(like, kept * num_matrices, rank)
        size = payload.component_size(like, counts, scope, exact_each=rank, index_bits=count_bits(scope))
        if options.keep_norm:
            scales = Count.of(num_matrices * (scope.a + scope.b))
            size = size._replace(exact=size.exact + scales)
        return ranks.offer(tail_energy, size)

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        found = _principal(start, trained, scope.ranks)
        counts = _counts(budget, found, ranks.whole(kept, scope.ranks), scope.ranks)
        message = _message(start, trained, found, counts, options.keep_norm, scope)
        decoded = decode(start, message, scope).adapters
        in_use = ranks.everywhere(scope.ranks, like)
        return message._replace(
            index_bits=count_bits(scope),
            dropped_energy=diagnostics.difference_energy(trained, decoded, in_use),
        )

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        modules = {}
        for name, rotated in message.tensors.modules.items():
            old, (of_a, of_b) = start.modules[name], message.exact[name]
            change_a = _turned_back(rotated.a, of_a, scope.ranks)
            change_b = _turned_back(jnp.swapaxes(rotated.b, -1, -2), of_b, scope.ranks)
            modules[name] = Factors(a=old.a + change_a, b=old.b + jnp.swapaxes(change_b, -1, -2))
        head = jax.tree.map(jnp.add, start.head, message.tensors.head)
        decoded = scope.select(Adapters(modules=modules, head=head), start)
        return Received(adapters=decoded, counted=ranks.everywhere(scope.ranks, like))

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method(
    "sparsifier",
    "soft_rotated",
    SoftRotatedConfig,
    make,
    needs=frozenset({"even_ranks"}),
    breaks=frozenset({"everything_sent"}),
)


class _Turn(NamedTuple):
    """What a factor's rotated change is turned back with, or the masks of what of it is sent.

    rotation: `[L, R, R]`, the components as columns. scale: `[L]`, to keep the norm; None for none.
    """

    rotation: Array
    scale: Array | None


def _message(
    start: Adapters,
    trained: Adapters,
    found: dict[str, "_Pair"],
    counts: dict[str, tuple[Array, Array]],
    keep_norm: bool,
    scope: Scope,
) -> Message:
    """The first components of either factor, `[L]` of each, by module; index and dropped energy are the caller's."""
    number, first = jnp.arange(scope.ranks.shape[-1]), {}
    for name, (of_a, of_b) in counts.items():
        first[name] = ((number < of_a[:, None]) * scope.a, (number < of_b[:, None]) * scope.b)
    first_a, first_b = ({name: pair[side] for name, pair in first.items()} for side in (0, 1))
    sent = ranks.sent_masks(start, first_a, first_b, scope)
    modules, exact, exact_sent = {}, {}, {}
    for name, pair in found.items():
        (turn_a, sent_a), (turn_b, sent_b) = (
            _turn(part, mask, scope.ranks, keep_norm) for part, mask in zip(pair, first[name], strict=True)
        )
        # Products in full float32: what is sent and turned back must be the change, not a bfloat16 copy of it.
        a = jnp.matmul(pair[0].change, turn_a.rotation, precision="highest")
        b = jnp.matmul(pair[1].change, turn_b.rotation, precision="highest")
        modules[name] = Factors(a=a, b=jnp.swapaxes(b, -1, -2))
        exact[name], exact_sent[name] = (turn_a, turn_b), (sent_a, sent_b)
    head = payload.pack(Adapters({}, start.head), Adapters({}, trained.head), Adapters({}, sent.head)).head
    kept = sum((jnp.sum(a + b) for a, b in counts.values()), jnp.uint32(0))
    return Message(
        tensors=Adapters(modules=modules, head=head),
        sent=sent,
        index_bits=Count.of(0),
        kept_ranks=kept / (2.0 * max(ranks.num_matrices(start), 1)),
        dropped_energy=jnp.zeros(()),
        exact=exact,
        exact_sent=exact_sent,
    )


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
    found = [_Principal(change, *part) for change, part in zip(flat, rotate_ranks(flat, rank_mask), strict=True)]
    return jax.tree.unflatten(structure, found)


def _turn(part: _Principal, first: Array, rank_mask: Array, keep_norm: bool) -> tuple[_Turn, _Turn]:
    """The rotation to the `first` components, a mask `[L, R]`, and what they lack of the norm of all; its masks."""
    mask = first[:, None, :] * rank_mask[:, None] > 0
    rotation = jnp.where(mask, part.rotation, 0.0)
    if not keep_norm:
        return _Turn(rotation, None), _Turn(mask, None)
    whole, sent = jnp.sum(part.energies, -1), jnp.sum(part.energies * first, -1)
    any_sent = jnp.any(first > 0, -1)
    scale = jnp.where(any_sent, jnp.sqrt(whole / jnp.where(sent > 0, sent, 1.0)), 0.0)
    return _Turn(rotation, scale), _Turn(mask, any_sent)


def _turned_back(rotated: Array, turn: _Turn, rank_mask: Array) -> Array:
    """A factor's change, `[L, n, R]`, of its orthogonal components."""
    rebuilt = jnp.matmul(rotated, jnp.swapaxes(turn.rotation, -1, -2), precision="highest") * rank_mask
    return rebuilt if turn.scale is None else rebuilt * turn.scale[:, None, None]
