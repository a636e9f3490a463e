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
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.ops import factorise
from fedjax_lora.sparsifiers import payload, ranks
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, arriving


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdConfig(Options):
    """Send the k largest singular triples of each matrix; exact, hence without a regulariser to weigh."""

    orthogonality: ClassVar[float] = 0.0
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


def make(config: SvdConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of truncated products.

    A component costs its `n_in + n_out` values, and for each factor r more: its row of `U_k^T a` or of `(b V_k)^T`, in
    the ranks in use. Its tail energy is the sum of squared singular values left out.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how U_k and V_k travel; their products with the factors travel in full.
    """
    del config  # it has no option yet, but every method is made in the same way
    max_rank = ranks.max_rank(like)
    payload.check_fits(like, 2 * max_rank)

    def bits(kept: Array, scope: Scope) -> Array:
        rank = jnp.sum(scope.ranks).astype(jnp.uint32)
        parts = [
            payload.component_bits(kept * f.a.shape[0], f, scope, wire, exact_values=rank)
            for f in like.modules.values()
        ]
        return sum(parts, payload.common_bits(like, scope, wire))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        head_key, key = jax.random.split(key)
        kept = ranks.num_kept(keep_ratio, scope.ranks)
        keep, energies, modules = jnp.arange(max_rank) < kept, [], {}
        found = _decompose(trained, scope.ranks)
        for (name, svd), part in zip(found.items(), jax.random.split(key, len(found)), strict=True):
            key_a, key_b = jax.random.split(part)
            factors = trained.modules[name]
            a = _projected(factors.a, svd.u * keep, wire, key_a)
            b = _projected(jnp.swapaxes(factors.b, -1, -2), svd.v * keep, wire, key_b)
            modules[name] = Factors(a=a, b=jnp.swapaxes(b, -1, -2))
            energies.append(jnp.sum(jnp.where(keep, 0.0, svd.s) ** 2))
        head = arriving(wire, Adapters({}, trained.head), Adapters({}, start.head), head_key).head
        sent = Sent(
            adapters=scope.select(Adapters(modules=modules, head=head), start),
            counted=ranks.everywhere(scope.ranks, like),
            bits=bits(kept, scope),
            kept_ranks=kept.astype(jnp.float32),
            dropped_energy=jnp.sum(jnp.stack(energies)),
        )
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        values = [svd.s for svd in _decompose(trained, scope.ranks).values()]
        return ranks.tail_energy(jnp.concatenate(values) ** 2, "module")

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=lambda keep_ratio, scope: bits(ranks.num_kept(keep_ratio, scope.ranks), scope).astype(jnp.float32),
        compress=compress,
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


def _projected(x: Array, basis: Array, wire: Wire, key: Array) -> Array:
    """`x`, `[L, n, R]`, on the columns of `basis`, `[L, n, R]`, of which the receiver has a copy from the wire."""
    coordinates = jnp.matmul(jnp.swapaxes(basis, -1, -2), x, precision="highest")
    return jnp.matmul(wire.encode(basis, key), coordinates, precision="highest")
