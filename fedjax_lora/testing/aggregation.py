"""The laws of aggregators: what the server makes of a cohort."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.aggregation.products import as_changes
from fedjax_lora.core.exchange import Aggregator
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, close, named, rows


def _cohort(method: Aggregator, seeds: tuple[int, ...], start: Adapters) -> Adapters:
    """Clients `[C, ...]`, each trained in what the method has them send in its first round."""
    live = method.traffic(jnp.int32(0), True).sent
    scope = examples.scope(examples.RANK, *live)
    return examples.stack([examples.trained(seed, start, scope) for seed in seeds])


def _aggregated(method: Aggregator, start: Adapters, clients: Adapters, weights: Any = examples.WEIGHTS) -> Any:
    held, received = clients, examples.everything(clients)
    if method.resumes:
        own = examples.stack([start] * len(weights)).modules
        held, received = as_changes(own, held, received)
    return method.aggregate(start, held, received, jnp.array(weights), jnp.float32(examples.SCALE), jax.random.key(0))


def _products(method: Aggregator, start: Adapters, found: Any) -> dict[str, Any]:
    """What the server's weights have gained since the broadcast, by module."""
    gained = {}
    for name, old in start.modules.items():
        new = found.adapters.modules[name]
        gained[name] = examples.SCALE * (new.a @ new.b - old.a @ old.b) + found.merged.get(name, 0.0)
    return gained


def exercise(method: Aggregator, context: Context) -> Any:
    """What the server makes of a round, and what it adds to one client's."""
    start = examples.adapters(0)
    clients = _cohort(method, (1, 2, 3, 4), start)
    found = _aggregated(method, start, clients)
    one = jax.tree.map(lambda leaf: leaf[0], clients)
    rank = jnp.float32(examples.RANK)
    following = method.next_rank(start, one, rank) if method.next_rank else rank
    down = method.extra_downlink(start, context.cohort_size, rank).float32()
    return found, method.penalty(one, examples.scope().ranks), following, down


def equal_clients_average_to_themselves(subject: Subject) -> None:
    """Where all clients have trained the same, the server gains its product and has its head: weights sum to 1."""
    method, start = subject.record, examples.adapters(0)
    clients = _cohort(method, (1, 1, 1, 1), start)
    after = _aggregated(method, start, clients)
    found = _products(method, start, after)
    close(after.adapters.head, jax.tree.map(lambda leaf: leaf[0], clients.head))
    for name, old in start.modules.items():
        new = jax.tree.map(lambda leaf: leaf[0], clients.modules[name])
        close(found[name], examples.SCALE * (new.a @ new.b - old.a @ old.b), rtol=2e-2, atol=2e-2)


def who_is_absent_changes_nothing(subject: Subject) -> None:
    """A client of weight 0 is not looked at, not even where it holds NaN."""
    method, start = subject.record, examples.adapters(0)
    clients = _cohort(method, (1, 2, 3, 4), start)
    weights = (0.5, 0.3, 0.2, 0.0)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), clients)
    found, expected = (_aggregated(method, start, cohort, weights) for cohort in (poisoned, clients))
    close((found.adapters, found.merged), (expected.adapters, expected.merged))


def no_order_of_the_clients_is_special(subject: Subject) -> None:
    """Clients in another order give the same product."""
    method, start, order = subject.record, examples.adapters(0), [2, 0, 3, 1]
    clients = _cohort(method, (1, 2, 3, 4), start)
    weights = [examples.WEIGHTS[i] for i in order]
    other = _products(method, start, _aggregated(method, start, rows(clients, order), weights))
    close(other, _products(method, start, _aggregated(method, start, clients)), rtol=2e-3, atol=2e-3)


def without_clients_nothing_moves(subject: Subject) -> None:
    """All-zero weights leave the broadcast, and merge nothing."""
    method, start = subject.record, examples.adapters(0)
    found = _aggregated(method, start, _cohort(method, (1, 2, 3, 4), start), (0.0,) * 4)
    close(found.adapters, start)
    for leaf in jax.tree.leaves(found.merged):
        np.testing.assert_array_equal(leaf, 0.0)


def weights_of_the_mean_product_sum_to_one(subject: Subject) -> None:
    """`enter` gives each component weights that sum to 1 over the clients."""
    method, start = subject.record, examples.adapters(0)
    clients = _cohort(method, (1, 2, 3, 4), start)
    counted = examples.everything(clients).counted
    for name, old in start.modules.items():
        layer = jax.tree.map(lambda leaf: leaf[0], old)
        theirs, mask = jax.tree.map(lambda leaf: leaf[:, 0], (clients.modules[name], counted[name]))
        _, w = method.enter(layer, theirs, mask, jnp.array(examples.WEIGHTS))
        close(jnp.sum(w, 0), jnp.ones(w.shape[1]))


def one_client_after_the_other_gives_the_same(subject: Subject) -> None:
    """`fold` equals `aggregate`, also where a client of weight 0 holds NaN, and sums of single clients add up."""
    method, start = subject.record, examples.adapters(0)
    if method.fold is None:
        return
    clients, weights = _cohort(method, (1, 2, 3, 4), start), (0.5, 0.3, 0.2, 0.0)
    expected = _aggregated(method, start, clients, weights).adapters
    received = examples.everything(jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), clients))
    nothing = together = sums = method.fold.init(start)
    for i, weight in enumerate(weights):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], received)
        sums = method.fold.add(sums, start, one, jnp.float32(weight))
        together = jax.tree.map(jnp.add, together, method.fold.add(nothing, start, one, jnp.float32(weight)))
    close(method.fold.finish(sums, start), expected)
    close(method.fold.finish(together, start), expected)


LAWS = named(
    equal_clients_average_to_themselves,
    who_is_absent_changes_nothing,
    no_order_of_the_clients_is_special,
    without_clients_nothing_moves,
    weights_of_the_mean_product_sum_to_one,
    one_client_after_the_other_gives_the_same,
)
