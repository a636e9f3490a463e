"""One round, top to bottom: channel, cohort, training, control, sparsification, transmission, aggregation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core import trees
from fedjax_lora.core.keys import RoundKeys, client_keys, round_keys
from fedjax_lora.core.methods import Aggregate, Decision, Delivery, Live, Observation, Sent
from fedjax_lora.core.types import Adapters, ClientState, Factors, FedState, Metrics, Scope
from fedjax_lora.ops.products import differences
from fedjax_lora.sim.cohort import choose, map_over_devices, padded_size
from fedjax_lora.sim.metrics import observe
from fedjax_lora.sim.parts import Cohort, Local, Parts, Uplink, World, scope_of
from fedjax_lora.training.local import Broadcast, Client, Trained
from fedjax_lora.training.personal import extract

SPARSIFIED_AT_ONCE = 32
"""Clients on each device, or a whole chunk of training: few enough for memory, and one at a time is slow."""

RoundFn = Callable[[World, FedState], tuple[FedState, Metrics]]


def make_round(parts: Parts) -> RoundFn:
    """`(world, state) -> (state, metrics)`: one round of federated LoRA over the simulated cell."""

    def round_fn(world: World, state: FedState) -> tuple[FedState, Metrics]:
        keys = round_keys(state.key, state.round)

        # 1. Draw the channel.
        link = parts.link.step(state.link, keys.channel, jnp.arange(world.data.count.shape[0]))
        state = dataclasses.replace(state, link=link)

        # 2. Choose the cohort, and broadcast to it.
        cohort = choose_cohort(parts, world, state, keys)

        # 3. Train locally; who diverged is left out from here on.
        local = train_locally(parts, world, state, cohort)

        # 4. Importance of each rank, and 5. control of keep ratio and bandwidth.
        tail_energy = importance(parts, cohort, local)
        decision = control(parts, state, cohort, local, tail_energy)

        # 6. Sparsify, and 7. transmit.
        sent, memory = sparsify(parts, cohort, local, decision, keys.sparsify)
        uplink = transmit(parts, cohort, local, decision, sent, memory)

        # 8. Aggregate, step the server, update the queue.
        aggregate = average(parts, state, cohort, local, uplink, keys.aggregate)
        after = advance(parts, state, cohort, local, uplink, aggregate)
        return after, observe(after, cohort, local, tail_energy, uplink, aggregate)

    return round_fn


def choose_cohort(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> Cohort:
    """Steps 2 and the broadcast: who takes part, what each sends, and when it can begin to."""
    num_clients = world.data.count.shape[0]
    size = padded_size(parts.cohort_size, parts.chunk, parts.mesh.size)
    ids, present = choose(keys.cohort, num_clients, parts.cohort_size, size)
    own, link = trees.take((state.clients, state.link), ids)
    ranks = jax.vmap(rank_mask, (0, None))(own.rank, max_rank(state.adapters))
    sends, receives = parts.aggregator.sends(state.round), parts.receives(state.round)

    scope = Scope(rank_mask(state.hyper.rank, max_rank(state.adapters)), *map(jnp.float32, receives))

    def broadcast(ranks: Array) -> tuple[Adapters, Array]:
        adapters, bits = parts.sparsifier.broadcast(state.adapters, scope, ranks)
        return adapters, bits + parts.drift_bits(Scope(ranks, *map(jnp.float32, sends)))

    start, downlink_bits = jax.vmap(broadcast, out_axes=(None, 0))(ranks)
    downlink_bits += jnp.where(state.round > 0, parts.extra_downlink_bits(state.hyper.rank), 0)
    count = world.data.count[ids]
    samples = parts.samples(count)
    return Cohort(
        ids=ids,
        present=present,
        link=link,
        clients=Client(world.data.index[ids], count, client_keys(keys.local, ids), own),
        ranks=ranks,
        sends=sends,
        start=start,
        downlink_bits=downlink_bits,
        samples=samples,
        start_s=parts.link.start_s(link, samples, downlink_bits, present),
    )


def train_locally(parts: Parts, world: World, state: FedState, cohort: Cohort) -> Local:
    """Step 3: local training, with what diverged or is padding put back to the broadcast."""
    trained = train_cohort(parts, world, state, cohort.start, cohort.clients)
    finite = jax.vmap(trees.fits_float32)(trained.adapters)
    active = cohort.present & finite
    adapters = keep_where(active, trained.adapters, cohort.start)
    shown = adapters
    if parts.aggregator.keeps:  # else what a client holds is what it sends, and a copy is saved
        shown = jax.vmap(lambda own, ranks: cohort.scope(ranks).select(own, cohort.start))(adapters, cohort.ranks)
    return Local(
        trained=trained._replace(adapters=adapters),
        shown=shown,
        finite=finite,
        active=active,
        weight=parts.client_weight(cohort.clients.examples),
    )


def train_cohort(parts: Parts, world: World, state: FedState, start: Adapters, clients: Client) -> Trained:
    """Local training of every client of the cohort: leaves `[C, ...]`."""
    given = Broadcast(
        base=parts.current_base(world, state),
        pool=world.data.train,
        adapters=start,
        live=Live(*map(jnp.float32, parts.aggregator.trains(state.round))),
        drift=state.drift,
        hyper=state.hyper,
        round=state.round,
    )
    return map_over_devices(parts.train, given, clients, parts.chunk, parts.mesh)


def importance(parts: Parts, cohort: Cohort, local: Local) -> Array:
    """Step 4: what the ranks of each client are worth, as the energy left out without them, `[C, R + 1]`."""

    def tail_energy(shared: tuple[Adapters, Live], item: tuple[Adapters, Array]) -> Array:
        (start, sends), (shown, ranks) = shared, item
        return parts.sparsifier.tail_energy(start, shown, scope_of(ranks, sends))

    shared, items = (cohort.start, cohort.sends), (local.shown, cohort.ranks)
    return map_over_devices(tail_energy, shared, items, max(parts.chunk, SPARSIFIED_AT_ONCE), parts.mesh)


def control(parts: Parts, state: FedState, cohort: Cohort, local: Local, tail_energy: Array) -> Decision:
    """Step 5: keep ratio and bandwidth of each client, as the controller has it."""

    def payload_bits(keep_ratio: Array, ranks: Array) -> Array:
        scope = cohort.scope(ranks)
        return parts.sparsifier.payload_bits(keep_ratio, scope) + parts.drift_bits(scope)

    observation = Observation(
        snr_hz=parts.link.snr_hz(cohort.link),
        start_s=cohort.start_s,
        weights=normalised(local.weight * local.active),
        tail_energy=tail_energy,
        rank=cohort.clients.state.rank,
        payload_bits=lambda keep_ratio: jax.vmap(payload_bits)(keep_ratio, cohort.ranks),
        bandwidth_hz=jnp.float32(parts.link.bandwidth_hz),
        queue_s=state.queue_s,
        hyper=state.hyper,
        energy_queue_j=state.energy_queue_j,
        power_w=parts.link.power_w,
    )
    return parts.controller.decide(observation)


def sparsify(parts: Parts, cohort: Cohort, local: Local, decision: Decision, key: Array) -> tuple[Sent, Any]:
    """Step 6: what each client sends, with the bits of all that it sends, and what its sparsifier remembers.

    Some at a time: what one client's choice takes beside its adapters is not held for all of them.
    """

    def compress(shared: tuple[Adapters, Live], item: Any) -> tuple[Sent, Any]:
        (start, sends), (shown, memory, keep_ratio, ranks, key) = shared, item
        scope = scope_of(ranks, sends)
        sent, memory = parts.sparsifier.compress(start, shown, memory, keep_ratio, scope, key)
        return dataclasses.replace(sent, bits=sent.bits + parts.drift_bits(scope)), memory

    keys, chunk = client_keys(key, cohort.ids), max(parts.chunk, SPARSIFIED_AT_ONCE)
    items = local.shown, cohort.clients.state.memory, decision.keep_ratio, cohort.ranks, keys
    sent, memory = map_over_devices(compress, (cohort.start, cohort.sends), items, chunk, parts.mesh)
    return dataclasses.replace(sent, bits=jnp.where(local.active, sent.bits, 0)), memory


def transmit(parts: Parts, cohort: Cohort, local: Local, decision: Decision, sent: Sent, memory: Any) -> Uplink:
    """Step 7: who is heard, and when the round ends."""
    delivery = parts.link.deliver(cohort.link, cohort.samples, sent.bits, decision, cohort.start_s, cohort.present)
    return Uplink(
        decision=decision,
        sent=sent,
        memory=memory,
        delivery=delivery,
        arrived=local.active & delivery.delivered,
        latency_s=round_latency(delivery, local.active),
    )


def average(parts: Parts, state: FedState, cohort: Cohort, local: Local, uplink: Uplink, key: Array) -> Aggregate:
    """Step 8, as the aggregator has it."""
    held, received = local.shown, uplink.sent.adapters
    if not parts.one_rank:  # else b is zero beyond the ranks in use, and two copies are saved
        held, received = (jax.vmap(own_product)(adapters, cohort.ranks) for adapters in (held, received))
    sent = dataclasses.replace(uplink.sent, adapters=received)
    if parts.aggregator.resumes:
        held, sent = as_changes(cohort.clients.state.own, held, sent)
    return parts.aggregator.aggregate(
        cohort.start,
        held,
        sent,
        normalised(local.weight * uplink.arrived),
        state.hyper.alpha / state.hyper.rank,
        key,
    )


def advance(
    parts: Parts, state: FedState, cohort: Cohort, local: Local, uplink: Uplink, aggregate: Aggregate
) -> FedState:
    """The state after the round; `state` holds its channel already."""
    adapters, server = step_server(parts, state, cohort, aggregate)
    clients = remember(parts, state, cohort, local, uplink)
    mean_energy_j = jnp.sum(uplink.delivery.energy_j) / jnp.maximum(jnp.sum(cohort.present), 1)
    return dataclasses.replace(
        state,
        round=state.round + 1,
        adapters=adapters,
        server=server,
        queue_s=parts.controller.update_queue(state.queue_s, uplink.latency_s),
        energy_queue_j=parts.controller.update_energy_queue(state.energy_queue_j, mean_energy_j),
        elapsed_s=state.elapsed_s + uplink.latency_s,
        merged=jax.tree.map(jnp.add, state.merged, aggregate.merged),
        drift=parts.drift.next_server(state.drift, mean_change(clients.drift, state.clients.drift)),
        clients=clients,
    )


def step_server(parts: Parts, state: FedState, cohort: Cohort, aggregate: Aggregate) -> tuple[Adapters, Any]:
    """The new global adapters, and the server optimizer's state."""
    start = cohort.start
    pseudo_gradient = jax.tree.map(jnp.subtract, start, aggregate.adapters)
    updates, server = parts.optimizer.update(pseudo_gradient, state.server, state.adapters)
    # Momentum would move what is at rest in this round.
    shared = cohort.scope(rank_mask(state.hyper.rank, max_rank(start)))
    updates = shared.select(updates, jax.tree.map(jnp.zeros_like, start))
    # To the state's adapters, which are whole also where the broadcast was not.
    return jax.tree.map(jnp.add, state.adapters, updates), server


def remember(parts: Parts, state: FedState, cohort: Cohort, local: Local, uplink: Uplink) -> ClientState:
    """What all clients carry on; only for those of the cohort who were heard it is new."""
    old, trained, next_rank = cohort.clients.state, local.trained, parts.aggregator.next_rank
    new = ClientState(
        rank=jax.vmap(next_rank, (None, 0, 0))(cohort.start, trained.adapters, old.rank) if next_rank else old.rank,
        kept=extract(trained.adapters, parts.aggregator.keeps),
        memory=uplink.memory,
        drift=trained.drift,
        own=trained.adapters.modules if parts.aggregator.resumes else {},
    )
    return scatter(state.clients, cohort.ids, uplink.arrived, new, old)


def mean_change(new: Any, old: Any) -> Any:
    """The mean over all K clients of how their states changed."""
    return jax.tree.map(lambda x, y: jnp.mean(x - y, axis=0), new, old)


def normalised(weight: Array) -> Array:
    """`[C]` weights that sum to 1, or all zeros."""
    weight = weight.astype(jnp.float32)
    return weight / jnp.maximum(jnp.sum(weight), 1e-30)


def keep_where(active: Array, trained: Adapters, start: Adapters) -> Adapters:
    """The trained adapters `[C, ...]` of the active clients; the broadcast for the others."""
    return jax.tree.map(lambda x, x0: jnp.where(active.reshape((-1,) + (1,) * x0.ndim), x, x0), trained, start)


def own_product(adapters: Adapters, ranks: Array) -> Adapters:
    """One client's adapters with b zero where `ranks` `[R]` is: there it holds the broadcast, nothing of its own."""
    modules = {name: Factors(a=f.a, b=f.b * ranks[:, None]) for name, f in adapters.modules.items()}
    return Adapters(modules=modules, head=adapters.head)


def as_changes(own: dict[str, Factors], held: Adapters, sent: Sent) -> tuple[Adapters, Sent]:
    """What the clients hold and what arrived, `[C, ...]`, as the changes of their products since they began."""
    held, received = (
        dataclasses.replace(adapters, modules=differences(adapters.modules, own)) for adapters in (held, sent.adapters)
    )
    counted = {name: jnp.concatenate([mask, mask], axis=-1) for name, mask in sent.counted.items()}
    return held, dataclasses.replace(sent, adapters=received, counted=counted)


def round_latency(delivery: Delivery, active: Array) -> Array:
    """Seconds until the last upload ended; who diverged or can never be heard is not waited for."""
    heard = active & jnp.isfinite(delivery.latency_s)
    return jnp.max(jnp.where(heard, delivery.latency_s, 0.0))


def scatter(memory, ids: Array, arrived: Array, new, old):
    """All clients' memory `[K, ...]` with the rows of those who were heard replaced."""
    rows = trees.where(arrived, new, old)
    return jax.tree.map(lambda whole, row: whole.at[ids].set(row, mode="drop"), memory, rows)
