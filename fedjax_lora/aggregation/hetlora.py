"""HetLoRA: clients of different ranks that prune themselves, padded with zeros and weighted by what they have learned.

Y. J. Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv
2401.06432. Ours: the defaults of gamma and lambda; that norms are taken of each layer of each module and summed, so
that a client prunes all of its modules or none; that the weights also count the clients' own p_k, and each layer of
each module has weights of its own.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.aggregation import fedit, folds
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Aggregator, Fold, Received
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.ops.products import product_energy, safe_sqrt

FLOOR_SLACK = 1e-4
"""Added before rounding down, so that a product rounded to float32 does not lose a rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HetLoraConfig(Options):
    """How clients lower their own ranks.

    prune: gamma in (0, 1]: a client of rank r falls to `max(1, floor(gamma r))` where its trailing ranks have shrunk; 1
      leaves all ranks as they are. By default one rank at a time.
    regularisation: lambda >= 0, weight of the norms of the trailing ranks in the local loss; there are none where prune
      is 1.
    """

    name: Literal["hetlora"] = "hetlora"
    prune: float = traced(0.99)
    regularisation: float = traced(1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.prune <= 1.0:
            raise ValueError(f"prune must be in (0, 1], got {self.prune}")
        if not 0.0 <= self.regularisation < float("inf"):
            raise ValueError(f"regularisation must be finite and at least 0, got {self.regularisation}")

    def breaks(self) -> dict[str, str]:
        return {"one_rank": "prune"} if self.prune < 1.0 else {}


def make(options: HetLoraConfig, context: Context) -> Aggregator:
    """The aggregator of zero-padded factors, whose clients prune themselves.

    With `t = sum ||a_{gamma r:r}||_F ||b_{gamma r:r}||_F` over modules and layers, a client adds `lambda t` to its
    local loss, and falls to the shorter rank where local training ended with a smaller t than it began with. With
    gamma = 1 there are no trailing ranks: t is 0, and ranks stay.
    """
    del context  # shapes are those of what arrives

    def shorter(rank: Array) -> Array:
        return jnp.maximum(jnp.floor(options.prune * rank + FLOOR_SLACK), 1.0)

    def penalty(adapters: Adapters, rank_mask: Array) -> Array:
        rank = jnp.sum(rank_mask)
        return options.regularisation * trailing_norm(adapters, shorter(rank), rank)

    def next_rank(broadcast: Adapters, trained: Adapters, rank: Array) -> Array:
        began, ended = (trailing_norm(adapters, shorter(rank), rank) for adapters in (broadcast, trained))
        return jnp.where(ended < began, shorter(rank), rank)

    average = fedit.averaging(zero_padded, zero_padded_fold())
    return average._replace(penalty=penalty, next_rank=next_rank)


METHOD = Method(
    "aggregation", "hetlora", HetLoraConfig, make, needs=frozenset({"unchanged_where_unsent", "trained_apart"})
)


def zero_padded(old: Factors, received: Factors, counted: Array, weights: Array) -> tuple[Factors, Array]:
    """The `Enter` in which client k weighs `p_k ||a_k b_k||_F`, normalised, and is zero where it does not count.

    Where nobody counts, all enter with the broadcast; where all products are zero, all weigh p.
    """
    own = jnp.where(weights[:, None] > 0, counted, 0.0)
    a, b = received.a * own[:, None, :], received.b * own[:, :, None]
    raw = weights * jnp.sqrt(product_energy(a, b))
    total = jnp.sum(raw)
    w = jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), weights)
    anyone = jnp.any(own > 0, axis=0)
    entering = Factors(a=jnp.where(anyone, a, old.a), b=jnp.where(anyone[:, None], b, old.b))
    return entering, jnp.broadcast_to(w[:, None], counted.shape)


def zero_padded_fold() -> Fold:
    """The average of `zero_padded` client by client.

    Weights in hand are p_k ||a_k b_k||_F, and p_k in case all of these turn out zero: there are two sums, as large as
    two clients' updates, and the weights of who counts in each component, `[L, R]` a module.
    """
    by_norm, by_p = folds.weighted(_weigh_by_norm), folds.weighted(_weigh_by_p)

    def init(broadcast: Adapters) -> tuple[folds.Sums, folds.Sums, dict[str, Array]]:
        sums = by_norm.init(broadcast), by_p.init(broadcast)
        return *sums, {name: jnp.zeros_like(weight) for name, weight in sums[0].weight.items()}

    def add(sums, broadcast: Adapters, received: Received, p: Array):
        counted = {
            name: trees.where(p > 0, so_far + p * received.counted[name], so_far) for name, so_far in sums[2].items()
        }
        return by_norm.add(sums[0], broadcast, received, p), by_p.add(sums[1], broadcast, received, p), counted

    def finish(sums, broadcast: Adapters) -> Adapters:
        usual, equal = by_norm.finish(sums[0], broadcast), by_p.finish(sums[1], broadcast)
        modules = {}
        for name, old in broadcast.modules.items():
            mean = trees.where(jnp.any(sums[0].weight[name] > 0, axis=-1), usual.modules[name], equal.modules[name])
            anyone = sums[2][name] > 0
            modules[name] = Factors(
                a=jnp.where(anyone[:, None, :], mean.a, old.a), b=jnp.where(anyone[:, :, None], mean.b, old.b)
            )
        return Adapters(modules=modules, head=equal.head)

    return Fold(init, add, finish)


def _weigh_by_norm(old: Factors, received: Factors, counted: Array, p: Array) -> tuple[Factors, Array]:
    entering, equal = _weigh_by_p(old, received, counted, p)
    return entering, equal * jnp.sqrt(product_energy(entering.a, entering.b))[:, None]


def _weigh_by_p(old: Factors, received: Factors, counted: Array, p: Array) -> tuple[Factors, Array]:
    del old
    own = Factors(a=received.a * counted[:, None, :], b=received.b * counted[:, :, None])
    return own, jnp.broadcast_to(p, counted.shape)


def trailing_norm(adapters: Adapters, first: Array, stop: Array) -> Array:
    """`sum ||a_{first:stop}||_F ||b_{first:stop}||_F` over modules and layers; its gradient is finite where b = 0."""
    total = jnp.zeros(())
    for factors in adapters.modules.values():
        rank = jnp.arange(factors.a.shape[-1])
        tail = ((rank >= first) & (rank < stop)).astype(factors.a.dtype)
        of_a = jnp.sum((factors.a * tail) ** 2, axis=(-2, -1))
        of_b = jnp.sum((factors.b * tail[:, None]) ** 2, axis=(-2, -1))
        total += jnp.sum(safe_sqrt(of_a) * safe_sqrt(of_b))
    return total
