"""What clients send: what it is worth and costs, what the server decodes, and an average that holds one at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core import count
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Aggregate, Live, Received
from fedjax_lora.core.keys import client_keys
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sim.cohort import in_even_parts
from fedjax_lora.sim.parts import Cohort, Local, Offers, Parts, Uplink, Upload
from fedjax_lora.sim.selection import correction_bits, normalised
from fedjax_lora.sparsifiers import payload, transforms

SPARSIFIED_BYTES = 2**24
"""Of the cohort's arrays that each device sparsifies at once, or a whole chunk of training: small steps are slow."""


def importance(parts: Parts, cohort: Cohort, local: Local) -> Offers:
    """Step 4: what the ranks of each client are worth, and what they cost."""

    def offer(shared: tuple[Adapters, Live], item: tuple[Adapters, Array]) -> Offers:
        (start, sends), (shown, ranks) = shared, item
        scope, start = parts.scope_on_air(ranks, sends), parts.on_air(start)
        found = parts.sparsifier.offer(start, parts.on_air(shown), scope)
        bits = payload.bits(found.size, parts.transforms) + correction_bits(parts, start, scope)
        return Offers(found.tail_energy, bits.float32())

    return _map_cohort(parts, offer, cohort, (local.shown, cohort.ranks))


def sparsify(parts: Parts, cohort: Cohort, local: Local, kept: Array, key: Array) -> Upload:
    """Step 6: what each client sends and the server decodes, where it keeps `kept` `[C]` ranks.

    Some at a time: what one client's choice takes beside its adapters is not held for all of them. What the server
    decodes is not held either where it is averaged client by client.
    """

    def send(shared: tuple[Adapters, Live], item: Any) -> Upload:
        received, upload = sent(parts, shared, item)
        return upload._replace(received=received) if parts.layout.all_at_once else upload

    upload = _map_cohort(parts, send, cohort, _to_send(cohort, local, kept, key))
    return upload._replace(bits=count.where(local.active, upload.bits, Count.of(0)))


def average_one_by_one(parts: Parts, cohort: Cohort, local: Local, uplink: Uplink, key: Array) -> Aggregate:
    """Step 8 by the aggregator's fold: sums over the clients of each device, then over devices.

    Each message is made and decoded once more, by the same `key` as in `sparsify`, so that none is held for long. The
    error norms, which compare every update with the average, are not measured.
    """
    fold = parts.aggregator.fold
    assert fold is not None  # as the configuration has seen to

    def add(shared: tuple[Adapters, Live], item: Any) -> Any:
        (start, _), (to_send, p) = shared, item
        received = sent(parts, shared, to_send)[0]
        if not parts.layout.one_rank:
            received = dataclasses.replace(received, adapters=own_product(received.adapters, to_send[3]))
        return fold.add(fold.init(start), start, received, p)

    items = _to_send(cohort, local, uplink.decision.kept, key), normalised(local.weight * uplink.arrived)
    sums = parts.layout.sum(add, (cohort.start, cohort.sends), items, sparsified_at_once(items))
    not_measured = jnp.float32(jnp.nan)
    return Aggregate(fold.finish(sums, cohort.start), {}, not_measured, not_measured)


def _to_send(cohort: Cohort, local: Local, kept: Array, key: Array) -> Any:
    """What `sent` takes of each client, leaves `[C, ...]`."""
    return local.shown, cohort.clients.methods["sparsifier"], kept, cohort.ranks, client_keys(key, cohort.ids)


def sent(parts: Parts, shared: tuple[Adapters, Live], item: Any) -> tuple[Received, Upload]:
    """What the server decodes of one client, and the upload without it.

    shared: the broadcast, and the parts that are sent. item: of the client, see `_to_send`.
    """
    (start, sends), (shown, memory, kept, ranks, key) = shared, item
    scope, (encode_key, transform_key) = parts.scope_on_air(ranks, sends), jax.random.split(key)
    start, held = parts.on_air(start), parts.on_air(shown)
    message = parts.sparsifier.encode(start, held, memory, kept, scope, encode_key)
    bits = payload.bits(payload.message_size(message), parts.transforms) + correction_bits(parts, start, scope)
    message = transforms.apply(parts.transforms, message, transform_key)
    received = parts.sparsifier.decode(start, message, scope)
    memory = parts.sparsifier.remember(held, memory, received, scope)
    if parts.side is not None:
        received = parts.side.received(received, shown, scope.ranks)
    return received, Upload(None, bits, message.kept_ranks, message.dropped_energy, memory)


def _map_cohort(parts: Parts, work: Callable[..., Any], cohort: Cohort, items: Any) -> Any:
    """`work((start, sends), item)` of every client of the cohort."""
    layout, starts = parts.layout, cohort.arrivals and cohort.arrivals.starts
    on_device = jax.tree.leaves(items)[0].shape[0] // layout.num_devices
    at_once = in_even_parts(on_device, sparsified_at_once(items))
    chunk = layout.chunk if layout.in_order else max(layout.chunk, at_once)
    if starts is None:
        return layout.map(work, (cohort.start, cohort.sends), items, chunk)
    return layout.map(lambda sends, item: work((item[0], sends), item[1]), cohort.sends, (starts, items), chunk)


def sparsified_at_once(items: Any) -> int:
    """Clients, on the leading axis of the leaves, that take SPARSIFIED_BYTES; at least one."""
    leaves = jax.tree.leaves(items)
    return max(SPARSIFIED_BYTES * leaves[0].shape[0] // sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), 1)


def own_product(adapters: Adapters, ranks: Array) -> Adapters:
    """One client's adapters with b zero where `ranks` `[R]` is: there it holds the broadcast, nothing of its own."""
    modules = {name: Factors(a=f.a, b=f.b * ranks[:, None]) for name, f in adapters.modules.items()}
    return Adapters(modules=modules, head=adapters.head)
