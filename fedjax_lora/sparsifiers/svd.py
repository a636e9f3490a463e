"""The truncated SVD of each client's product: the best that k rank components can do, and what SOFT does without.

P_k, the best approximation of `a b` of rank k (Eckart and Young, 1936), with top singular vectors U_k and V_k, is
sent as factors in the client's own basis, `a' = U_k (U_k^T a)` and `b' = (b V_k) V_k^T`, since
`a' b' = U_k U_k^T a b V_k V_k^T = P_k`. Balanced factors `U_k sqrt(S)`, `sqrt(S) V_k^T` have the same product, but
their signs and rotations differ from client to client and a server that averages a with a would cancel them; these
stay near the broadcast and are the client's own factors at k = r. Averages of factors in different subspaces still
differ from the average of the products: that is the covariance error in the metrics, and larger than without
truncation. Where one factor is frozen, projecting the other gives P_k too.

The product is not formed: QR of either thin factor leaves an SVD of size R x R. That choice of factors is ours.
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
from fedjax_lora.ops import factorise
from fedjax_lora.sparsifiers import payload, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdConfig(Options):
    """Send the k largest singular triples of each matrix; exact, hence without a regulariser to weigh."""

    name: Literal["svd"] = "svd"


class Svd(NamedTuple):
    """Singular triples of M matrices, largest first; those of ranks that are not in use come last, with value 0.

    u: `[M, n_in, R]`. s: `[M, R]`. v: `[M, n_out, R]`.
    """

    u: Array
    s: Array
    v: Array


def full_svd(a: Array, b: Array) -> Svd:
    """The SVD of `a b`, `[M, n_in, R]` by `[M, R, n_out]`, by way of the product: what `thin_svd` is measured against.

    Work is O(n_in n_out min(n_in, n_out)) a matrix.
    """
    u, s, vt = factorise.svd(jnp.matmul(a, b, precision="highest"))
    max_rank = a.shape[-1]
    return Svd(u[..., :max_rank], s[..., :max_rank], jnp.swapaxes(vt, -1, -2)[..., :max_rank])


def thin_svd(a: Array, b: Array, rank_mask: Array | None = None) -> Svd:
    """The SVD of `a b` without the product: with `a = Q_a R_a` and `b^T = Q_b R_b`, that of `R_a R_b^T`, turned.

    Work is O((n_in + n_out) R^2) a matrix. Where singular values are zero, the vectors still span the factors.

    Args:
      a: `[M, n_in, R]`.
      b: `[M, R, n_out]`.
      rank_mask: `[R]`, 1 for the first r ranks; None for all.
    """
    n_in, n_out, max_rank = a.shape[-2], b.shape[-1], a.shape[-1]
    mask = jnp.ones(max_rank) if rank_mask is None else rank_mask
    width = max(n_in, n_out, max_rank)
    q, r = factorise.qr(jnp.concatenate([_padded(a * mask, width), _padded(jnp.swapaxes(b, -1, -2) * mask, width)]))
    (q_a, q_b), (r_a, r_b) = jnp.split(q, 2), jnp.split(r, 2)
    core = jnp.matmul(r_a, jnp.swapaxes(r_b, -1, -2), precision="highest")
    peak = jnp.max(jnp.abs(core), axis=(-2, -1), keepdims=True)
    # At a peak of 1, values are at most R. Unused ranks move from 0 to 2 R, so that their vectors cannot mix with those
    # of ranks in use whose values are zero too; they come first and are rolled to the end.
    u, s, vt = factorise.svd(core / jnp.where(peak > 0, peak, 1.0) + 2.0 * max_rank * jnp.diag(1.0 - mask))
    unused = jnp.sum(1.0 - mask).astype(jnp.int32)
    u, s, v = (jnp.roll(x, -unused, axis=-1) for x in (u, s, jnp.swapaxes(vt, -1, -2)))
    u, v = jnp.matmul(q_a, u, precision="highest"), jnp.matmul(q_b, v, precision="highest")
    return Svd(u[:, :n_in], s * mask * peak[..., 0], v[:, :n_out])


def make(options: SvdConfig, context: Context) -> Sparsifier:
    """The sparsifier of truncated products.

    A component costs its `n_in + n_out` values, and for each factor r more: its row of `U_k^T a` or of `(b V_k)^T`, in
    the ranks in use, which travels in full. Its tail energy is the sum of squared singular values left out.
    """
    del options  # it has no option yet, but every method is made in the same way
    like = ranks.shapes(context)
    max_rank = ranks.max_rank(like)

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        values = [svd.s for svd in _decompose(trained, scope.ranks).values()]
        tail_energy = ranks.tail_energy(jnp.concatenate(values) ** 2, "module")
        kept, rank = ranks.each(scope.ranks), jnp.sum(scope.ranks).astype(jnp.uint32)
        counts = {name: (kept * f.a.shape[0], kept * f.a.shape[0]) for name, f in like.modules.items()}
        return ranks.offer(tail_energy, payload.component_size(like, counts, scope, exact_each=rank))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        count = ranks.whole(kept, scope.ranks)
        keep, found = jnp.arange(max_rank) < count, _decompose(trained, scope.ranks)
        first = ranks.everywhere(keep * 1.0, like)
        sent = ranks.sent_masks(like, first, first, scope)
        bases, coordinates, coordinates_sent, energies = {}, {}, {}, []
        for name, svd in found.items():
            factors, masks = trained.modules[name], sent.modules[name]
            u, v = jnp.where(masks.a, svd.u, 0.0), jnp.where(masks.b, jnp.swapaxes(svd.v, -1, -2), 0.0)
            bases[name] = Factors(a=u, b=v)
            coordinates_sent[name] = tuple(
                jnp.swapaxes(mask, -1, -2) & (scope.ranks > 0) for mask in (masks.a, jnp.swapaxes(masks.b, -1, -2))
            )
            # Products in full float32: what is sent must be the factor, not a bfloat16 copy of it.
            of_a = jnp.matmul(jnp.swapaxes(u, -1, -2), factors.a, precision="highest")
            of_b = jnp.matmul(v, jnp.swapaxes(factors.b, -1, -2), precision="highest")
            coordinates[name] = tuple(
                jnp.where(mask, x, 0.0) for mask, x in zip(coordinates_sent[name], (of_a, of_b), strict=True)
            )
            energies.append(jnp.sum(jnp.where(keep, 0.0, svd.s) ** 2))
        head = payload.pack(Adapters({}, start.head), Adapters({}, trained.head), Adapters({}, sent.head)).head
        return Message(
            tensors=Adapters(modules=bases, head=head),
            sent=sent,
            index_bits=Count.of(0),
            kept_ranks=count.astype(jnp.float32),
            dropped_energy=jnp.sum(jnp.stack(energies)),
            exact=coordinates,
            exact_sent=coordinates_sent,
        )

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        modules = {}
        for name, basis in message.tensors.modules.items():
            of_a, of_b = message.exact[name]
            a = jnp.matmul(basis.a, of_a, precision="highest")
            b = jnp.matmul(jnp.swapaxes(basis.b, -1, -2), of_b, precision="highest")
            modules[name] = Factors(a=a, b=jnp.swapaxes(b, -1, -2))
        head = jax.tree.map(jnp.add, start.head, message.tensors.head)
        decoded = scope.select(Adapters(modules=modules, head=head), start)
        return Received(adapters=decoded, counted=ranks.everywhere(scope.ranks, like))

    return Sparsifier(offer=offer, encode=encode, decode=decode)


METHOD = Method(
    "sparsifier",
    "svd",
    SvdConfig,
    make,
    needs=frozenset({"shared_b", "even_ranks"}),
    breaks=frozenset({"everything_sent"}),
)


def _decompose(adapters: Adapters, rank_mask: Array) -> dict[str, Svd]:
    """The SVD of every product, by module, from one call."""
    modules = adapters.modules
    n_in, n_out = max(f.a.shape[1] for f in modules.values()), max(f.b.shape[2] for f in modules.values())
    a = jnp.concatenate([_padded(f.a, n_in) for f in modules.values()])
    b = jnp.concatenate([_padded(jnp.swapaxes(f.b, -1, -2), n_out) for f in modules.values()])
    u, s, v = thin_svd(a, jnp.swapaxes(b, -1, -2), rank_mask)
    found, first = {}, 0
    for name, f in modules.items():
        rows = slice(first, first + f.a.shape[0])
        found[name] = Svd(u[rows, : f.a.shape[1]], s[rows], v[rows, : f.b.shape[2]])
        first += f.a.shape[0]
    return found


def _padded(x: Array, width: int) -> Array:
    """`[M, n, R]` with rows of zeros up to `[M, width, R]`."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)))
