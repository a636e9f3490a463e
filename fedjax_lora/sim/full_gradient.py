"""Loss and gradient by the weights themselves: for what measures rather than trains."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.adapters.lora import add_to_base, effective, max_rank, rank_mask
from fedjax_lora.core.methods import Model
from fedjax_lora.core.types import Adapters, Base, Hyper
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.training.local import cross_entropy


class Gradient(NamedTuple):
    """By all that training may move: module name -> `[L, n_in, n_out]` of its weights, and the head's leaves."""

    modules: dict[str, Array]
    head: dict[str, Array]


FullGradient = Callable[[Base, Mapping[str, Array], Adapters, Hyper], tuple[Array, Gradient]]


def make_full_gradient(model: Model, batch_size: int) -> FullGradient:
    """`(base, pool, adapters, hyper) -> (mean cross-entropy of the pool, Gradient)`, a batch at a time, no dropout.

    The model's products are in float32, whatever the dtype of the weights that it is given.
    """

    def full_gradient(
        base: Base, pool: Mapping[str, Array], adapters: Adapters, hyper: Hyper
    ) -> tuple[Array, Gradient]:
        num_examples = pool["label"].shape[0]
        base = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, base)
        used = effective(adapters, rank_mask(hyper.rank, max_rank(adapters)), hyper.alpha / hyper.rank)
        nothing = {name: jnp.zeros((*f.a.shape[:2], f.b.shape[2])) for name, f in used.modules.items()}

        def loss(moved: Gradient, rows: Array, weight: Array) -> Array:
            batch = gather(pool, rows)
            logits = model.apply(
                add_to_base(base, moved.modules, model.targets), Adapters(used.modules, moved.head), batch
            )
            return cross_entropy(logits, batch["label"], weight) * jnp.sum(weight) / num_examples

        def add(total: tuple[Array, Gradient], batch: tuple[Array, Array]):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(start, *batch)), None

        start = Gradient(nothing, used.head)
        batches = evaluation_batches(num_examples, batch_size)
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, start)
        return lax.scan(add, zero, jax.tree.map(jnp.asarray, batches))[0]

    return full_gradient
