"""Loss and gradient by the weights themselves: for what measures rather than trains."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.adapters.lora import add_to_base, max_rank, rank_mask
from fedjax_lora.core.learning import Adapter, Model, Task
from fedjax_lora.core.types import Adapters, Base, Batch, Packing
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.data.packing import packed


class Gradient(NamedTuple):
    """By all that training may move: module name -> `[L, n_in, n_out]` of its weights, and the head's leaves."""

    modules: dict[str, Array]
    head: dict[str, Array]


FullGradient = Callable[[Base, Mapping[str, Array], Adapters, Array, Array], tuple[Array, Gradient]]


def make_full_gradient(
    model: Model, adapter: Adapter, task: Task, batch_size: int, packing: Packing | None = None
) -> FullGradient:
    """`(base, pool, adapters, rank, scale) -> (mean loss of the pool, Gradient)`, a batch at a time, no dropout.

    `rank` is the structural one, and `scale` is s = alpha / r. The model's products are in float32, whatever the dtype
    of the weights that it is given.
    """

    def full_gradient(
        base: Base, pool: Mapping[str, Array], adapters: Adapters, rank: Array, scale: Array
    ) -> tuple[Array, Gradient]:
        num_examples = next(iter(pool.values())).shape[0]
        base = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, base)
        used = adapter.effective(adapters.modules, rank_mask(rank, max_rank(adapters)), scale)
        sites = {name: model.sites[name] for name in used}
        nothing = {name: jnp.zeros((model.num_layers, site.n_in, site.n_out)) for name, site in sites.items()}

        def loss(moved: Gradient, batch: Batch, weight: Array) -> Array:
            outputs = model.apply(
                add_to_base(base, moved.modules, model.sites), Adapters(modules=used, head=moved.head), batch
            )
            return task.loss(outputs, batch, weight) * jnp.sum(weight) / num_examples

        def add(total: tuple[Array, Gradient], rows_and_weight: tuple[Array, Array]):
            rows, weight = rows_and_weight
            found = packed(packing, gather(pool, rows), weight, lambda batch: gradient(start, batch, weight))
            return jax.tree.map(jnp.add, total, found), None

        start, gradient = Gradient(nothing, adapters.head), jax.value_and_grad(loss)
        batches = evaluation_batches(num_examples, batch_size)
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, start)
        return lax.scan(add, zero, jax.tree.map(jnp.asarray, batches))[0]

    return full_gradient
