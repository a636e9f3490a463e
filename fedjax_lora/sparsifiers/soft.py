"""SOFT: rank components chosen by their norms, kept near orthogonal by a regulariser.

Our reading of B. Kim and W. Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal
Updates", arXiv 2505.00333v2, of which the abstract alone was at hand: it fixes near-orthogonal factors, importance
from norms, and that both factors are sparsified together by rank; every option of `SoftConfig` is ours.

If the a_i, or the b_i, of a module are mutually orthogonal, the energy of any set of components is the sum of
their squared norms, so the top k by norm are the best k; if both are, they are the truncated SVD (Eckart-Young).
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.exchange import Message, Offer, Received, Sparsifier
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.ops.products import gram, safe_sqrt
from fedjax_lora.ops.soft_sparsify import change_energy
from fedjax_lora.sparsifiers import diagnostics, ranks
from fedjax_lora.sparsifiers.ranks import Budget, Missing

Form = Literal["offdiag", "identity", "a_only", "none"]
Send = Literal["factors", "change"]


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
    orthogonality: float = traced(0.1)
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

    def needs(self) -> dict[str, str]:
        """What is remembered of a component is added to the same one later."""
        return {"fixed_basis": "error_feedback"} if self.error_feedback else {}

    def breaks(self) -> dict[str, str]:
        """What a client does not send is unchanged, and tail energies are whole, with some of the options alone."""
        found = {"whole_tail": "error_feedback"} if self.error_feedback else {}
        if self.missing == "senders" or self.send == "factors":
            found["unchanged_where_unsent"] = "missing" if self.missing == "senders" else "send"
        return found

    def note(self, broken: Collection[str]) -> str | None:
        """What these options turn into where clients sit out rounds, or where what is zero stays zero."""
        if self.error_feedback and "full_participation" in broken:
            return (
                "sparsifier: error_feedback adds what a client left out many rounds ago, where clients sit out rounds: "
                "it is known to harm"
            )
        if self.send == "factors" and self.missing == "zero" and "lasting_zeros" not in broken:
            return (
                "sparsifier: send: factors with missing: zero pulls unsent ranks to zero, where they stay: "
                "it becomes a LoRA of fixed rank keep_ratio * rank"
            )
        if self.form == "identity" and self.orthogonality > 0:
            return (
                "sparsifier: form: identity pulls all components to one norm, which leaves their norms little to tell"
            )
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
    return safe_sqrt(jnp.maximum(change_energy(a, b, a0, b0), 0.0))


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


def make(options: SoftConfig, context: Context) -> Sparsifier:
    """The sparsifier of these options.

    A component of one layer costs `n_in + n_out` values, and each matrix an index that says which are kept. With the
    global budget the size that is offered is the largest that a choice can have: the widest modules first. Its tail
    energy is the sum of squared importances left out.
    """
    like, budget = ranks.shapes(context), options.budget

    def offer(start: Adapters, trained: Adapters, scope: Scope) -> Offer:
        energies = [jnp.maximum(sigma, 0.0) ** 2 for sigma in _scores(options.send, start, trained, scope).values()]
        tail_energy = ranks.tail_energy(jnp.concatenate(energies), budget)
        return ranks.offer(tail_energy, ranks.planned_size(ranks.each(scope.ranks), budget, like, scope))

    def encode(start: Adapters, trained: Adapters, memory: Any, kept: Array, scope: Scope, key: Array) -> Message:
        held = with_memory(trained, memory, scope)
        sigma = _scores(options.send, start, held, scope)
        chosen = ranks.choose(sigma, ranks.whole(kept, scope.ranks), budget, scope)
        index = ranks.chosen_index_bits(chosen, budget)
        if options.send == "change":
            return ranks.encode(start, held, chosen, scope, index)
        drop = {name: scope.of_module(name) - mask for name, mask in chosen.items()}
        message = ranks.encode(_without_factors(start), held, chosen, scope, index)
        return message._replace(dropped_energy=diagnostics.dropped_energy(held, drop))

    def decode(start: Adapters, message: Message, scope: Scope) -> Received:
        if options.send == "change":
            return ranks.decode(start, message, scope, options.missing)
        known = _without_factors(start)
        fill = scope.select(known, start) if options.missing == "zero" else start
        return ranks.decode(start, message, scope, options.missing, known, fill)

    def with_memory(trained: Adapters, memory: Any, scope: Scope) -> Adapters:
        if not options.error_feedback:
            return trained
        return scope.select(jax.tree.map(jnp.add, trained, memory), trained)

    def remember(trained: Adapters, memory: Any, received: Received, scope: Scope) -> Any:
        if not options.error_feedback:
            return memory
        held = with_memory(trained, memory, scope)
        return scope.select(jax.tree.map(jnp.subtract, held, received.adapters), memory)

    def penalty(adapters: Adapters, rank_mask: Array) -> Array:
        terms = [orthogonality_penalty(f.a, f.b, options.form, rank_mask) for f in adapters.modules.values()]
        return options.orthogonality * jnp.sum(jnp.stack(terms))

    return Sparsifier(
        offer=offer,
        encode=encode,
        decode=decode,
        init=lambda adapters: jax.tree.map(jnp.zeros_like, adapters) if options.error_feedback else (),
        remember=remember,
        penalty=penalty,
    )


METHOD = Method(
    "sparsifier",
    "soft",
    SoftConfig,
    make,
    needs=frozenset({"shared_b"}),
    breaks=frozenset({"everything_sent"}),
)


def _without_factors(start: Adapters) -> Adapters:
    """What a receiver knows who is told the factors themselves: the head alone."""
    return Adapters(modules=jax.tree.map(jnp.zeros_like, start.modules), head=start.head)


def _scores(send: Send, start: Adapters, trained: Adapters, scope: Scope) -> dict[str, Array]:
    """`[L, R]` importances; a rank that is not in use has -1 and comes after all others."""
    found = {}
    for name, f in trained.modules.items():
        f0 = start.modules[name]
        sigma = importance(f.a, f.b) if send == "factors" else importance(f.a, f.b, f0.a, f0.b)
        found[name] = jnp.where(scope.of_module(name) > 0, sigma, -1.0)
    return found
