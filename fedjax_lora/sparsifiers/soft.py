"""SOFT: rank components chosen by their norms, kept near orthogonal by a regulariser.

Our reading of B. Kim and W. Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal
Updates", arXiv 2505.00333v2, of which the abstract alone was at hand: it fixes near-orthogonal factors, importance
from norms, and that both factors are sparsified together by rank; every option of `SoftConfig` is ours.

If the a_i, or the b_i, of a module are mutually orthogonal, the energy of any set of components is the sum of
their squared norms, so the top k by norm are the best k; if both are, they are the truncated SVD (Eckart-Young).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.ops.products import gram, safe_sqrt
from fedjax_lora.ops.rank_energy import rank_energy
from fedjax_lora.sparsifiers import diagnostics, payload, ranks
from fedjax_lora.sparsifiers.ranks import Budget
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, arriving

Form = Literal["offdiag", "identity", "a_only", "none"]
Send = Literal["factors", "change"]
Missing = Literal["senders", "zero"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig(Options):
    """Options of SOFT; all are our reading of the paper's abstract, and the defaults our choice, see docs/method.md.

    orthogonality: weight of the regulariser, >= 0; 0 where `form` is none.
    form: of the regulariser, see `orthogonality_penalty`.
    send: what is sent of a kept component: its `factors`, or their `change` since the broadcast. It decides by
      which norm components are chosen: by the factors, those that were large already count as much as those that
      moved.
    missing: how a component that was not sent enters the average. `senders`: the client has no say in it. `zero`:
      as zero factors or a zero change. Methods that average products count every client, see `aggregation.products`.
    budget: keep k components of each `module` and layer, or as many in all, chosen over the whole adapter
      (`global`).
    error_feedback: a client adds what it left out to its next update; it goes with `send: change`, and harms where
      clients take part rarely.
    """

    name: Literal["soft"] = "soft"
    orthogonality: float = 0.1
    form: Form = "offdiag"
    send: Send = "change"
    missing: Missing = "senders"
    budget: Budget = "module"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.orthogonality < float("inf"):
            raise ValueError(f"orthogonality must be finite and at least 0, got {self.orthogonality}")
        if self.form == "none" and self.orthogonality > 0:
            raise ValueError(f"orthogonality must be 0 where form is none, got {self.orthogonality}")
        if self.error_feedback and self.send != "change":
            raise ValueError(f"error_feedback must be false where send is {self.send}, got True")


def degeneracy(config: SoftConfig, refilled: bool = False, sit_out: bool = False) -> str | None:
    """One line on what these options silently turn into, or None.

    Args:
      config: its options.
      refilled: whether the server fills all components anew every round.
      sit_out: whether clients sit out rounds.
    """
    if config.error_feedback and sit_out:
        return (
            "sparsifier: error_feedback adds what a client left out many rounds ago, where clients sit out rounds: "
            "it is known to harm"
        )
    if config.send == "factors" and config.missing == "zero" and not refilled:
        return (
            "sparsifier: send: factors with missing: zero pulls unsent ranks to zero, where they stay: "
            "it becomes a LoRA of fixed rank keep_ratio * rank"
        )
    if config.form == "identity" and config.orthogonality > 0:
        return "sparsifier: form: identity pulls all components to one norm, which leaves their norms little to tell"
    return None


def importance(a: Array, b: Array, a0: Array | None = None, b0: Array | None = None) -> Array:
    """Norm of each rank component, or of its change, from norms and dot products of the factors alone.

    `||a_i b_i||_F = |a_i| |b_i|`. The change `a_i b_i - a0_i b0_i` equals `da_i bm_i + am_i db_i`, with the
    changes d and the midpoints m of the factors, so its squared norm is
    `|da|^2 |bm|^2 + |am|^2 |db|^2 + 2 (da . am) (db . bm)`. This is `|a|^2 |b|^2 + |a0|^2 |b0|^2 -
    2 (a . a0) (b . b0)` without the cancellation that would drown a small change in float32.
    Work is O(R (n_in + n_out)). Gradients are finite everywhere, and 0 where a component is zero.

    Args:
      a: `[..., n_in, R]`.
      b: `[..., R, n_out]`.
      a0: the factor that a started from, or None.
      b0: the factor that b started from; given if and only if a0 is.

    Returns:
      `[..., R]`, >= 0.
    """
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"b must have the rank of a, {a.shape[-1]}, on its second last axis, got {b.shape[-2]}")
    if (a0 is None) != (b0 is None):
        raise ValueError(f"a0 and b0 must be given together, got only {'b0' if a0 is None else 'a0'}")
    if a0 is None or b0 is None:
        return safe_sqrt(jnp.sum(a * a, axis=-2)) * safe_sqrt(jnp.sum(b * b, axis=-1))
    of_a, of_b = rank_energy(a, a0, axis=-2), rank_energy(b, b0, axis=-1)
    energy = of_a.change * of_b.mean + of_a.mean * of_b.change + 2.0 * of_a.cross * of_b.cross
    return safe_sqrt(jnp.maximum(energy, 0.0))


def orthogonality_penalty(a: Array, b: Array, form: Form = "offdiag", rank_mask: Array | None = None) -> Array:
    """The regulariser that keeps rank components apart; only R x R Gram matrices are formed.

    `offdiag`: `||offdiag(a^T a)||_F^2 + ||offdiag(b b^T)||_F^2`. `a_only`: its first term. `none`: 0.
    `identity`: `||a^T a - I||_F^2 + ||b b^T - I||_F^2`, which also fights b = 0 and makes all norms alike.

    Args:
      a: `[..., n_in, R]`.
      b: `[..., R, n_out]`.
      form: which of the forms.
      rank_mask: `[R]`, 1 for the ranks in use; None for all.

    Returns:
      Scalar, summed over leading axes.
    """
    if form == "none":
        return jnp.zeros(())
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    mask = jnp.ones(a.shape[-1]) if rank_mask is None else rank_mask
    grams = [gram(a * mask)]
    if form != "a_only":
        grams.append(gram(jnp.swapaxes(b, -1, -2) * mask))
    if form == "identity":
        return sum((jnp.sum((g - jnp.diag(mask)) ** 2) for g in grams), jnp.zeros(()))
    others = 1.0 - jnp.eye(a.shape[-1])
    return sum((jnp.sum((g * others) ** 2) for g in grams), jnp.zeros(()))


def make(config: SoftConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier of these options.

    A component of one layer costs `n_in + n_out` values, and each matrix an index that says which are kept. With the
    global budget `payload_bits` is the largest that a choice can cost: the widest modules first. Its tail energy is
    the sum of squared importances left out.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the numbers travel: of the factors, or of their changes, as `send` says.
    """
    payload.check_fits(like)
    num_matrices = ranks.num_matrices(like)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like.modules)

    def penalty(adapters: Adapters, rank_mask: Array) -> Array:
        terms = [orthogonality_penalty(f.a, f.b, config.form, rank_mask) for f in adapters.modules.values()]
        return jnp.sum(jnp.stack(terms))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        held = trained
        if config.error_feedback:
            held = scope.select(jax.tree.map(jnp.add, trained, memory), trained)
        kept, sigma = ranks.num_kept(keep_ratio, scope.ranks), _scores(config.send, start, held, scope.ranks)
        chosen = ranks.choose(sigma, kept, config.budget, scope.ranks)
        in_use = ranks.everywhere(scope.ranks, like)
        drop = {name: in_use[name] - mask for name, mask in chosen.items()}
        empty = Adapters(modules=nothing, head=start.head)
        known = empty if config.send == "factors" else start
        fill = ranks.replace(start, empty, in_use) if config.send == "factors" and config.missing == "zero" else start
        arrived = arriving(wire, ranks.replace(known, held, chosen), known, key)
        decoded = scope.select(ranks.replace(fill, arrived, chosen), start)
        if config.send == "factors":
            energy = diagnostics.dropped_energy(held, drop)
        else:
            energy = diagnostics.difference_energy(held, start, drop)
        sent = Sent(
            adapters=decoded,
            counted=chosen if config.missing == "senders" else in_use,
            bits=ranks.chosen_bits(chosen, config.budget, like, scope, wire),
            kept_ranks=sum((jnp.sum(mask) for mask in chosen.values()), jnp.zeros(())) / num_matrices,
            dropped_energy=energy,
        )
        if config.error_feedback:
            memory = scope.select(jax.tree.map(jnp.subtract, held, decoded), memory)
        return sent, memory

    def tail_energy(start: Adapters, trained: Adapters, scope: Scope) -> Array:
        energies = [
            jnp.where(scope.ranks > 0, sigma, 0.0) ** 2
            for sigma in _scores(config.send, start, trained, scope.ranks).values()
        ]
        return ranks.tail_energy(jnp.concatenate(energies), config.budget)

    def payload_bits(keep_ratio: Array, scope: Scope) -> Array:
        return ranks.planned_bits(keep_ratio, config.budget, like, scope, wire)

    return Sparsifier(
        init=lambda adapters: jax.tree.map(jnp.zeros_like, adapters) if config.error_feedback else (),
        penalty=penalty,
        broadcast=payload.dense_broadcast,
        tail_energy=tail_energy,
        payload_bits=payload_bits,
        compress=compress,
    )


def _scores(send: Send, start: Adapters, trained: Adapters, rank_mask: Array) -> dict[str, Array]:
    """`[L, R]` importances; a rank that is not in use comes after all others."""
    found = {}
    for name, f in trained.modules.items():
        f0 = start.modules[name]
        sigma = importance(f.a, f.b) if send == "factors" else importance(f.a, f.b, f0.a, f0.b)
        found[name] = jnp.where(rank_mask > 0, sigma, -1.0)
    return found
