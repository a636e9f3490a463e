"""Clients that begin and end at times of their own: who runs, from which model, until when, and whom the server takes.

C clients run at once, each in a place of its own. A round is a step of the server: it waits for the first M of them to
end. Who has ended begins anew, or another client in its place, at once and from the newest model, or at the step where
that falls later. Times are relative to the last step, so that they stay precise in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.control.common import bits_at, linear_tail
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.keys import RoundKeys, client_keys
from fedjax_lora.core.network import Decision, Observation
from fedjax_lora.core.types import Adapters, FedState
from fedjax_lora.sim.parts import Arrivals, Cohort, Parts, World
from fedjax_lora.sim.selection import broadcast, cohort_of, normalised, offered_bits


@struct.dataclass
class Running:
    """The clients that run; leaves are `[C, ...]`.

    ids: int32. free: bool, whether a place begins in this round; its client may be another one.
    left_s: seconds from the last step of the server until the client ends; of a free place until it begins, at most 0.
    version: int32, the step after which it begins or began. start: the model of that step.
    kept, share_hz: what control has decided for it, see `Decision`.
    """

    ids: Array
    free: Array
    left_s: Array
    version: Array
    start: Adapters
    kept: Array
    share_hz: Array


def first_running(parts: Parts, state: FedState) -> Running | tuple[()]:
    """All places free, before round 1; `()` where all clients of a round begin and end together."""
    size = parts.layout.running
    if size is None:
        return ()
    ids = jnp.arange(size, dtype=jnp.int32)
    model = _newest(parts, state, ids)
    return Running(
        ids=ids,
        free=jnp.ones(size, bool),
        left_s=jnp.zeros(size),
        version=jnp.zeros(size, jnp.int32),
        start=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), model),
        kept=jnp.zeros(size),
        share_hz=jnp.zeros(size),
    )


def _newest(parts: Parts, state: FedState, ids: Array) -> Adapters:
    """What clients that begin after this state start from."""
    ranks = jax.vmap(rank_mask, (0, None))(state.clients.rank[ids], max_rank(state.adapters))
    return broadcast(parts, state, ranks)[0]


def begin(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> FedState:
    """Free places are given clients, their channels are drawn, and control says until when each runs.

    What those who ended have given back of the band is shared by those who begin. Nobody has trained by then: a rank is
    worth the same as any other, and an upload takes as many bits as the sparsifier offers.
    """
    running, channels = state.methods["arrival"], state.methods["wireless"]
    free = running.free
    ids = _chosen(state.clients.rank.shape[0], running, keys.cohort)
    drawn = parts.wireless.step(trees.take(channels, ids), keys.channel, ids)
    beginning = jnp.where(free, ids, state.clients.rank.shape[0])
    channels = jax.tree.map(lambda whole, row: whole.at[beginning].set(row, mode="drop"), channels, drawn)

    rank, examples, own = state.clients.rank[ids], world.data.count[ids], trees.take(channels, ids)
    air, work = parts.controller.over_the_air, parts.trainer.work(examples)
    downlink = broadcast(parts, state, jax.vmap(rank_mask, (0, None))(rank, max_rank(state.adapters)))[1]
    radio = parts.wireless.observe(own, work, downlink.float32() if air else jnp.zeros(ids.shape), free)
    radio = radio._replace(band_hz=radio.band_hz * (jnp.sum(free) / free.size))
    seen = Observation(
        radio=radio,
        weights=normalised(parts.client_weight(examples) * free),
        rank=rank,
        tail_energy=linear_tail(rank, max_rank(state.adapters)),
        bits=offered_bits(parts, state, rank),
        whole_ranks=parts.sparsifier.whole_ranks,
    )
    decision = parts.controller.allocate(state.methods["control"], seen)
    bits = bits_at(seen, decision.kept) if air else jnp.zeros(ids.shape)
    ends_s = parts.wireless.deliver(own, work, bits, decision.share_hz, radio.start_s, free).latency_s
    ends_s = jnp.where(jnp.isfinite(ends_s), ends_s, radio.start_s)  # it cannot send, and ends when it has computed
    running = dataclasses.replace(
        running,
        ids=ids,
        left_s=jnp.where(free, running.left_s + ends_s, running.left_s),
        kept=jnp.where(free, decision.kept, running.kept),
        share_hz=jnp.where(free, decision.share_hz, running.share_hz),
    )
    return dataclasses.replace(state, methods={**state.methods, "arrival": running, "wireless": channels})


def _chosen(num_clients: int, running: Running, key: Array) -> Array:
    """`[C]` clients of all places: free ones are given a uniform sample of those who do not run."""
    size = running.ids.shape[0]
    if size == num_clients:
        return running.ids
    everyone = jnp.arange(num_clients, dtype=jnp.int32)
    priority = jax.vmap(jax.random.uniform)(client_keys(key, everyone))
    busy = jnp.where(running.free, num_clients, running.ids)
    highest = lax.top_k(priority.at[busy].set(-jnp.inf, mode="drop"), size)[1].astype(jnp.int32)
    new = jnp.sort(jnp.where(jnp.arange(size) < jnp.sum(running.free), highest, num_clients))
    return jnp.where(running.free, new[jnp.cumsum(running.free) - 1], running.ids)


def first_to_end(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> Cohort:
    """The cohort of the step: the first M to end, in the order of their places, and what they started from."""
    running, layout = state.methods["arrival"], parts.layout
    first = jnp.sort(lax.top_k(-running.left_s, layout.cohort_size)[1])
    size = running.ids.shape[0]
    places = jnp.concatenate([first, jnp.full(layout.padded_cohort - layout.cohort_size, size, first.dtype)])
    present = places < size
    num_clients = state.clients.rank.shape[0]
    ids, version, kept, share_hz, starts = trees.take(
        (running.ids, running.version, running.kept, running.share_hz, running.start), places
    )
    cohort = cohort_of(parts, world, state, keys, jnp.where(present, ids, num_clients), present)
    arrivals = Arrivals(
        places=places,
        starts=starts,
        version=version,
        discount=parts.arrival.discount((state.round - version).astype(jnp.float32)),
        decision=Decision(kept, jnp.where(present, share_hz, 0.0)),
        waited_s=jnp.maximum(jnp.max(running.left_s[first]), 0.0),
    )
    return cohort._replace(arrivals=arrivals)


def begin_again(parts: Parts, before: FedState, after: FedState, cohort: Cohort) -> Running | tuple[()]:
    """Who runs after the step: the places that were taken are free, and say from when and from which model.

    Who ended before the step begins when it ended, from the model before the step; the last one begins from the model
    after it.
    """
    arrivals, running = cohort.arrivals, before.methods["arrival"]
    if arrivals is None:
        return running
    places, waited_s = arrivals.places, arrivals.waited_s
    ended_s = running.left_s[places]
    last = ended_s >= waited_s
    newest = _newest(parts, after, cohort.ids)
    starts = jax.tree.map(
        lambda new, old: jnp.where(last.reshape((-1,) + (1,) * new.ndim), new, old), newest, cohort.start
    )

    def put(whole: Array, rows: Array | bool) -> Array:
        return whole.at[places].set(rows, mode="drop")

    return dataclasses.replace(
        running,
        free=put(jnp.zeros_like(running.free), True),
        left_s=put(running.left_s - waited_s, jnp.clip(ended_s - waited_s, -waited_s, 0.0)),
        version=put(running.version, jnp.where(last, after.round, before.round)),
        start=jax.tree.map(put, running.start, starts),
    )


def rebased(cohort: Cohort, held: Adapters, received: Received) -> tuple[Adapters, Received]:
    """Adapters `[C, ...]` as if their clients had started from the newest model: each change counts by its discount."""
    arrivals = cohort.arrivals
    if arrivals is None:
        return held, received

    def moved(x: Array, own: Array, start: Array) -> Array:
        discount = arrivals.discount.reshape((-1,) + (1,) * start.ndim)
        stale = (arrivals.version != cohort.round).reshape(discount.shape)
        return jnp.where(stale, start + discount * (x - own), x)

    def of(adapters: Adapters) -> Adapters:
        return jax.tree.map(moved, adapters, arrivals.starts, cohort.start)

    return of(held), dataclasses.replace(received, adapters=of(received.adapters))
