"""FedIT: the server averages each factor on its own.

J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644; here with
weights for each rank component, so that a client which did not send one may have no say in it.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import errors, folds
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Aggregate, Aggregator, Enter, Fold, Received, Scale
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops.masked_mean import masked_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedItConfig(Options):
    """Average a with a and b with b."""

    name: Literal["fedit"] = "fedit"


def make(options: FedItConfig, context: Context) -> Aggregator:
    """The aggregator that averages the factors apart, heads too; a component is averaged over those who sent it.

    A client of weight 0 changes nothing, not even with NaN. For the error norms a client holds the broadcast in the
    ranks that it does not have.
    """
    del options, context  # it has none yet, but every method is made in the same way
    return AVERAGE


METHOD = Method("aggregation", "fedit", FedItConfig, make)


def averaging(enter: Enter, fold: Fold) -> Aggregator:
    """The aggregator of the weighted averages of each factor, and of the heads by p.

    Args:
      enter: what of a layer enters, and its weights.
      fold: the same average client by client; it leaves both error norms unmeasured, see `aggregation.folds`.
    """

    def aggregate(
        broadcast: Adapters, trained: Adapters, received: Received, weights: Array, scale: Scale, key: Array
    ) -> Aggregate:
        del key
        modules, sparsification, covariance = {}, jnp.zeros(()), jnp.zeros(())
        for name, old in broadcast.modules.items():
            cohort = trained.modules[name], received.adapters.modules[name], received.counted[name]
            modules[name], of_sparsification, of_averaging = _average_module(enter, old, *cohort, weights)
            squared = errors.scale_of(scale, name) ** 2
            sparsification += jnp.sum(squared * of_sparsification)
            covariance += jnp.sum(squared * of_averaging)
        return Aggregate(
            adapters=Adapters(modules=modules, head=average_head(broadcast.head, received.adapters.head, weights)),
            merged={},
            sparsification_error=jnp.sqrt(sparsification),
            covariance_error=jnp.sqrt(covariance),
        )

    return Aggregator(aggregate=aggregate, enter=enter, fold=fold)


def by_senders(old: Factors, received: Factors, counted: Array, weights: Array) -> tuple[Factors, Array]:
    """The `Enter` in which `w_ki = p_k m_ki / sum_j p_j m_ji`, where m is `Received.counted`.

    Where nobody counts, all enter with the broadcast, by p.
    """
    p = weights[:, None]
    raw = p * jnp.where(p > 0, counted, 0.0)
    total = jnp.sum(raw, axis=0)
    anyone = total > 0
    w = jnp.where(anyone, raw / jnp.where(anyone, total, 1.0), p)
    a = jnp.where(anyone, received.a, old.a)
    b = jnp.where(anyone[:, None], received.b, old.b)
    return Factors(a=a, b=b), w


def _weigh(old: Factors, received: Factors, counted: Array, p: Array) -> tuple[Factors, Array]:
    """The `folds.Weigh` of `by_senders`."""
    del old
    return received, p * counted


AVERAGE = averaging(by_senders, folds.weighted(_weigh))
"""What FedIT is, and the methods that differ from it in what they train and send alone."""


def _average_module(
    enter: Enter, old: Factors, trained: Factors, decoded: Factors, counted: Array, weights: Array
) -> tuple[Factors, Array, Array]:
    """The average of one module `[L, ...]`, and the energies `[L]` of E_s and of Cov.

    Layer by layer: what is formed beside the cohort's adapters is a layer's worth of them.
    """

    def layer(index: Array) -> tuple[Factors, Array, Array]:
        before = trees.take(old, index)
        mine, received, m = jax.tree.map(lambda leaf: leaf[:, index], (trained, decoded, counted))
        mine, received = trees.where(weights > 0, (mine, received), (before, before))
        received, w = enter(before, received, m, weights)
        average = _average(before, received, w)
        return (
            average,
            errors.sparsification_energy(mine, received, weights, w),
            errors.covariance_energy(received, average, w),
        )

    return jax.lax.map(layer, jnp.arange(old.a.shape[0]))


def average_factors(old: Factors, received: Factors, counted: Array, weights: Array) -> Factors:
    """The average of one layer's factors, see `make`: a `[n_in, R]` and b `[R, n_out]`.

    Args:
      old: the broadcast.
      received: the server's copies, leaves `[C, ...]`; finite also for a client of weight 0.
      counted: `[C, R]`.
      weights: `[C]`, p_k.
    """
    return _average(old, *by_senders(old, received, counted, weights))


def _average(old: Factors, received: Factors, w: Array) -> Factors:
    """The weighted average of a layer's factors, `[n_in, R]` and `[R, n_out]`."""
    return Factors(
        a=masked_mean(old.a, received.a, w, axis=-2),
        b=masked_mean(old.b, received.b, w, axis=-1),
    )


def average_head(old: dict[str, Array], heads: dict[str, Array], weights: Array) -> dict[str, Array]:
    """The heads' average by p, as changes too."""

    def average(x0: Array, change: Array) -> Array:
        return x0 + jnp.einsum("c,c...->...", weights, change, precision=jax.lax.Precision.HIGHEST)

    changes = jax.tree.map(jnp.subtract, heads, old)
    return jax.tree.map(average, old, trees.where(weights > 0, changes, jax.tree.map(jnp.zeros_like, old)))
