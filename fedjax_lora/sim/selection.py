"""Who takes part in a round, and what each is sent: from all K clients to the cohort."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core import count, trees
from fedjax_lora.core.count import Count
from fedjax_lora.core.keys import RoundKeys, client_keys
from fedjax_lora.core.learning import Client, Exchange, Work, split_work
from fedjax_lora.core.network import Population, Radio
from fedjax_lora.core.types import Adapters, FedState, Scope
from fedjax_lora.sim.cohort import choose
from fedjax_lora.sim.parts import Cohort, Layout, Parts, World
from fedjax_lora.sparsifiers import payload


def seen_alone(parts: Parts, state: FedState, keys: RoundKeys) -> Array | None:
    """`[C]` clients of the cohort, where no other's channel is looked at in the round; None where all are."""
    if parts.controller.schedule is not None or parts.layout.everyone:
        return None
    return sample(parts.layout, state.clients.rank.shape[0], keys)[0]


def sample(layout: Layout, num_clients: int, keys: RoundKeys) -> tuple[Array, Array]:
    """A cohort that nobody chooses: all, or a uniform sample, see `choose`."""
    ids = jnp.arange(num_clients, dtype=jnp.int32)
    priority = None if layout.everyone else jax.vmap(jax.random.uniform)(client_keys(keys.cohort, ids))
    return choose(priority, num_clients, layout.cohort_size, layout.padded_cohort)


def draw_channel(parts: Parts, state: FedState, key: Array, ids: Array | None = None) -> FedState:
    """Step 1: the state with the round's channels of all K clients.

    Where the network forgets, only those of the clients `ids` `[C]` are drawn, if these are given.
    """
    step, every = parts.wireless.step, jnp.arange(state.clients.rank.shape[0])

    def drawn(channels: Any) -> FedState:
        return dataclasses.replace(state, methods={**state.methods, "wireless": channels})

    def of_all(channels: Any) -> Any:
        return step(channels, key, every)

    channels = state.methods["wireless"]
    if ids is None or parts.wireless.forgets is False:
        return drawn(of_all(channels))

    def of_cohort(channels: Any) -> Any:
        own = step(trees.take(channels, ids), key, ids)
        return jax.tree.map(lambda whole, row: whole.at[ids].set(row, mode="drop"), channels, own)

    return drawn(lax.cond(parts.wireless.forgets, of_cohort, of_all, channels))


def choose_cohort(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> Cohort:
    """Step 2 and the broadcast: who takes part, what each sends, and when it can begin to."""
    layout, controller = parts.layout, state.methods["control"]
    if parts.controller.schedule is None:
        ids, present = sample(layout, state.clients.rank.shape[0], keys)
    else:
        seen = population(parts, world, state, keys)
        priority, controller = parts.controller.schedule(controller, keys.cohort, seen)
        ids, present = choose(priority, state.clients.rank.shape[0], layout.cohort_size, layout.padded_cohort)
    return cohort_of(parts, world, state, keys, ids, present)._replace(controller=controller)


def cohort_of(parts: Parts, world: World, state: FedState, keys: RoundKeys, ids: Array, present: Array) -> Cohort:
    """The cohort of these clients, `[C]`, see `choose`."""
    layout = parts.layout
    own, wireless = trees.take((state.clients, state.methods["wireless"]), ids)
    ranks = jax.vmap(rank_mask, (0, None))(own.rank, max_rank(state.adapters))
    start, downlink = broadcast(parts, state, ranks)
    examples = world.data.count[ids]
    clients = Client(world.data.index[ids], examples, client_keys(keys.local, ids), own.rank, own.personal, own.methods)
    work, exchange = work_of(parts, world, state, clients, wireless)
    bits = downlink.float32() if parts.controller.over_the_air else jnp.zeros(ids.shape)
    radio = parts.wireless.observe(wireless, work, bits, present)
    return Cohort(
        ids=ids,
        present=present,
        wireless=wireless,
        clients=clients,
        ranks=ranks,
        sends=parts.aggregator.traffic(state.round, layout.everyone).sent,
        start=start,
        downlink=downlink,
        work=work,
        radio=radio if exchange is None else with_shared(radio, present, parts.trainer.in_turn),
        round=state.round,
        controller=state.methods["control"],
        exchange=exchange,
    )


def with_shared(radio: Radio, present: Array, in_turn: bool) -> Radio:
    """The radio of a cohort, of which each begins later for each that takes part and can be heard, itself among them.

    In turn it begins later for itself alone.

    Raises:
      ValueError: the network does not say what is shared.
    """
    if radio.shared_s is None:
        raise ValueError("wireless must give Radio.shared_s where clients exchange while they train, got None")
    return radio._replace(start_s=jnp.where(present, radio.start_s + waited_s(radio, present, in_turn), 0.0))


def waited_s(radio: Radio, present: Array, in_turn: bool) -> Array:
    """`[C]` seconds that server and downlink take for each client, with all others beside it or in turn."""
    assert radio.shared_s is not None  # as `with_shared` demands
    return (1 if in_turn else jnp.maximum(jnp.sum(present & (radio.snr_hz > 0)), 1)) * radio.shared_s


def work_of(
    parts: Parts, world: World, state: FedState, clients: Client, wireless: Any
) -> tuple[Work, Exchange | None]:
    """The work of the clients `[C]` in the round, and what they exchange with the server while they train.

    wireless: their part of the network's state.
    """
    work = parts.trainer.work(clients.examples)
    if parts.trainer.exchange is None:
        return work, None
    of_client = jax.vmap(parts.trainer.exchange, (None, None, 0, None))
    exchange = of_client(world.base, world.data.train, clients, state.methods["training"])
    if parts.trainer.choose is not None:
        present = jnp.ones(clients.examples.shape, bool)

        def radio_of(work: Work) -> Radio:
            return parts.wireless.observe(wireless, work, jnp.zeros(present.shape), present)

        work, exchange = parts.trainer.choose(radio_of, work.samples, exchange)
    else:
        work = split_work(work.samples, exchange)
    if not parts.controller.over_the_air:
        nothing = jnp.zeros(work.samples.shape)
        work = work._replace(up_bits=nothing, down_bits=nothing)
    return work, exchange


def population(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> Population:
    """All clients in a round, as a controller sees them before any of them trains."""
    own, data, ids = state.clients, world.data, jnp.arange(state.clients.rank.shape[0], dtype=jnp.int32)
    clients = Client(data.index[ids], data.count, client_keys(keys.local, ids), own.rank, own.personal, own.methods)
    work, _ = work_of(parts, world, state, clients, state.methods["wireless"])
    bits = offered_bits(parts, state, own.rank)
    return Population(
        ids=ids,
        radio=parts.wireless.observe(state.methods["wireless"], work, jnp.zeros(ids.shape), jnp.ones(ids.shape, bool)),
        weights=normalised(parts.client_weight(data.count)),
        rank=own.rank,
        bits=bits if work.up_bits is None else bits + work.up_bits[:, None],
        whole_ranks=parts.sparsifier.whole_ranks,
    )


def offered_bits(parts: Parts, state: FedState, rank: Array) -> Array:
    """`[K, R + 1]` float32 bits of an upload of 0 ... R ranks of clients of these ranks `[K]`, by shapes alone."""
    known, traffic = parts.on_air(state.adapters), parts.aggregator.traffic(state.round, parts.layout.everyone)

    def of_client(rank: Array) -> Array:
        scope = parts.scope_on_air(rank_mask(rank, max_rank(state.adapters)), traffic.sent)
        bits = payload.bits(parts.sparsifier.offer(known, known, scope).size, parts.transforms)
        return (bits + correction_bits(parts, known, scope)).float32()

    return jax.vmap(of_client)(rank)


def broadcast(parts: Parts, state: FedState, ranks: Array) -> tuple[Adapters, Count]:
    """What clients of the ranks `[C, R]` start from, and the bits `[C]` of all that each is sent."""
    traffic = parts.aggregator.traffic(state.round, parts.layout.everyone)
    scope = parts.scope_on_air(rank_mask(parts.rank, ranks.shape[-1]), traffic.received)
    of_adapters = parts.sparsifier.broadcast or payload.dense_broadcast

    def to_client(ranks: Array) -> tuple[Adapters, Count]:
        adapters, size = of_adapters(known, scope, ranks)
        return adapters, payload.bits(size, ()) + correction_bits(parts, known, parts.scope_on_air(ranks, traffic.sent))

    known = parts.on_air(state.adapters)
    start, bits = jax.vmap(to_client, out_axes=(None, 0))(ranks)
    start = start if parts.side is None else parts.side.put(start, state.adapters)
    clients = parts.layout.cohort_size if parts.layout.everyone else None
    more = parts.aggregator.extra_downlink(state.adapters, clients, parts.layer_ranks or parts.rank)
    return start, bits + count.where(state.round > 0, more, Count.of(0))


def correction_bits(parts: Parts, like: Adapters, scope: Scope) -> Count:
    """A client whose correction has a state sends the change of it and is sent the server's, both in full."""
    if not jax.tree.leaves(jax.eval_shape(parts.correction.init_client, like)):
        return Count.of(0)
    return payload.bits(payload.dense_size(like, scope), ())


def normalised(weight: Array) -> Array:
    """`[C]` weights that sum to 1, or all zeros."""
    weight = weight.astype(jnp.float32)
    return weight / jnp.maximum(jnp.sum(weight), 1e-30)
