"""Averages that take one client after the other: sums of weighted changes, as large as one client's update.

A round that folds holds no two updates at a time. The error norms compare each update with the average of all, so that
they cannot be had of sums: where a round folds they are NaN, "not measured".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Fold, Received
from fedjax_lora.core.types import Adapters, Factors

Weigh = Callable[[Factors, Factors, Array, Array], tuple[Factors, Array]]
"""What one client adds to a module's sums.

`(broadcast, received [L, ...], counted [L, R], p) -> (entering factors [L, ...], weights [L, R])`; the weights need not
sum to 1 over the clients.
"""


@struct.dataclass
class Sums:
    """Over the clients so far.

    change: weighted changes since the broadcast: of the factors by their weights, of the head by p.
    weight: module name -> `[L, R]`, of the factors.
    """

    change: Adapters
    weight: dict[str, Array]


def weighted(weigh: Weigh) -> Fold:
    """The fold of a weighted average of each factor; a component without weight stays as it was broadcast."""

    def init(broadcast: Adapters) -> Sums:
        weight = {name: jnp.zeros_like(f.b[..., 0]) for name, f in broadcast.modules.items()}
        return Sums(change=jax.tree.map(jnp.zeros_like, broadcast), weight=weight)

    def add(sums: Sums, broadcast: Adapters, received: Received, p: Array) -> Sums:
        change, weight = {}, {}
        for name, old in broadcast.modules.items():
            so_far = sums.change.modules[name]
            entering, w = weigh(old, received.adapters.modules[name], received.counted[name], p)
            change[name] = Factors(
                a=so_far.a + w[:, None, :] * (entering.a - old.a), b=so_far.b + w[:, :, None] * (entering.b - old.b)
            )
            weight[name] = sums.weight[name] + w
        head = jax.tree.map(
            lambda total, new, x0: total + p * (new - x0), sums.change.head, received.adapters.head, broadcast.head
        )
        added = Sums(change=Adapters(modules=change, head=head), weight=weight)
        return trees.where(p > 0, added, sums)

    def finish(sums: Sums, broadcast: Adapters) -> Adapters:
        modules = {
            name: _mean(old, sums.change.modules[name], sums.weight[name]) for name, old in broadcast.modules.items()
        }
        return Adapters(modules=modules, head=jax.tree.map(jnp.add, broadcast.head, sums.change.head))

    return Fold(init, add, finish)


def _mean(old: Factors, change: Factors, weight: Array) -> Factors:
    """A change of 0 gives the broadcast to the last bit."""
    share = 1.0 / jnp.where(weight > 0, weight, 1.0)
    return Factors(a=old.a + change.a * share[:, None, :], b=old.b + change.b * share[:, :, None])
