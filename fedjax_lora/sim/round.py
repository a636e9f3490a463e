"""One round, top to bottom: channel, cohort, training, control, sparsification, transmission, aggregation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from fedjax_lora import trees
from fedjax_lora.base import (
    CLIENT_SCOPE,
    Adapters,
    Aggregate,
    Aggregator,
    Base,
    ClientState,
    Controller,
    Dataset,
    Delivery,
    Drift,
    Factors,
    FedState,
    Link,
    Live,
    Metrics,
    Observation,
    Scope,
    Sent,
    Sparsifier,
)
from fedjax_lora.lora.adapters import rank_mask
from fedjax_lora.prng import RoundKeys, client_keys, round_keys
from fedjax_lora.sim.cohort import choose, map_over_devices, padded_size
from fedjax_lora.sim.kept import extract
from fedjax_lora.sim.local import Broadcast, Client, Train, Trained, max_rank
from fedjax_lora.sim.optimizers import Optimizer
from fedjax_lora.sparsifiers.diagnostics import orthogonality


@struct.dataclass
class World:
    """What no round changes: an argument of the program, so that it is never baked in as a constant."""

    base: Base
    data: Dataset


class Parts(NamedTuple):
    """The functions a round is made of.

    train: local training of one client. optimizer: the server's.
    drift_bits: `scope -> uint32` uplink bits of the drift correction of one client.
    extra_downlink_bits: of each broadcast, for what the aggregator merges.
    current_base: `(world, state) -> base`: the frozen weights with all that was merged into them.
    client_weight: examples `[C]` -> weights `[C]` in the average, not yet normalised.
    cohort_size: C, clients a round. chunk: clients trained at once on each device.
    """

    train: Train
    sparsifier: Sparsifier
    drift: Drift
    drift_bits: Callable[[Scope], Array]
    aggregator: Aggregator
    extra_downlink_bits: int
    current_base: Callable[[World, FedState], Base]
    controller: Controller
    link: Link
    optimizer: Optimizer
    client_weight: Callable[[Array], Array]
    cohort_size: int
    chunk: int
    mesh: Mesh


RoundFn = Callable[[World, FedState], tuple[FedState, Metrics]]


def make_round(parts: Parts) -> RoundFn:
    """`(world, state) -> (state, metrics)`: one round of federated LoRA over the simulated cell."""
    sparsifier, link = parts.sparsifier, parts.link

    def round_fn(world: World, state: FedState) -> tuple[FedState, Metrics]:
        keys = round_keys(state.key, state.round)

        # 1. Draw the channel.
        link_state = link.step(state.link, keys.channel, jnp.arange(world.data.count.shape[0]))

        # 2. Choose the cohort, and 3. train it.
        cohort = train_round(parts, world, state, keys)
        ids, present, own, scope, start = cohort.ids, cohort.present, cohort.own, cohort.scope, cohort.start
        trained, shown, active = cohort.trained, cohort.shown, cohort.active
        cohort_link = trees.take(link_state, ids)

        # 4. Importance of each rank, and 5. control of keep ratio and bandwidth.
        tail_energy = jax.vmap(sparsifier.tail_energy, (None, 0, CLIENT_SCOPE))(start, shown, scope)
        start_s = link.start_s(cohort_link, cohort.downlink_bits, present)
        decision = parts.controller.decide(
            Observation(
                snr_hz=link.snr_hz(cohort_link),
                start_s=start_s,
                weights=cohort.weights,
                tail_energy=tail_energy,
                rank=own.rank,
                payload_bits=lambda ratio: jax.vmap(sparsifier.payload_bits, (0, CLIENT_SCOPE))(ratio, scope),
                bandwidth_hz=jnp.float32(link.bandwidth_hz),
                queue_s=state.queue_s,
                hyper=state.hyper,
            )
        )

        # 6. Sparsify.
        sent, memory = jax.vmap(sparsifier.compress, (None, 0, 0, 0, CLIENT_SCOPE, 0))(
            start, shown, own.memory, decision.keep_ratio, scope, client_keys(keys.sparsify, ids)
        )

        # 7. Transmit.
        extra_bits = jax.vmap(parts.drift_bits, (CLIENT_SCOPE,))(scope)
        sent = dataclasses.replace(sent, bits=jnp.where(active, sent.bits + extra_bits, 0))
        delivery = link.deliver(cohort_link, sent.bits, decision, start_s, present)
        arrived = active & delivery.delivered

        # 8. Aggregate, step the server, update the queue.
        aggregate = aggregate_sent(parts, state, cohort, sent, arrived, keys.aggregate)
        latency_s = round_latency(delivery, active)
        new_state = dataclasses.replace(
            advance(parts, state, cohort, aggregate, memory, arrived),
            link=link_state,
            queue_s=parts.controller.update_queue(state.queue_s, latency_s),
            elapsed_s=state.elapsed_s + latency_s,
        )
        over_arrived = mean_over(arrived)
        metrics = Metrics(
            round=new_state.round,
            train_loss=over_arrived(trained.loss),
            eval_loss=jnp.float32(jnp.nan),
            eval_accuracy=jnp.float32(jnp.nan),
            personal_accuracy=jnp.float32(jnp.nan),
            latency_s=latency_s,
            elapsed_s=new_state.elapsed_s,
            client_uplink_bits=jnp.where(jnp.isfinite(delivery.latency_s), sent.bits, 0),
            client_downlink_bits=jnp.where(present, cohort.downlink_bits, 0),
            energy_j=jnp.sum(delivery.energy_j),
            queue_s=new_state.queue_s,
            keep_ratio_mean=over_arrived(decision.keep_ratio),
            kept_ranks_mean=over_arrived(sent.kept_ranks),
            participants=jnp.sum(arrived),
            outages=jnp.sum(active & ~delivery.delivered),
            nonfinite_clients=jnp.sum(present & ~cohort.finite),
            sparsification_error=aggregate.sparsification_error,
            covariance_error=aggregate.covariance_error,
            dropped_energy=over_arrived(sent.dropped_energy),
            orthogonality=over_arrived(jax.vmap(orthogonality)(trained.adapters, scope.ranks)),
        )
        return new_state, metrics

    return round_fn


class Cohort(NamedTuple):
    """A round's cohort after local training; leaves `[C, ...]` but for `scope`'s scalars and `start`.

    ids, present: see `choose`. own: what each client carried in. scope: what it sends. start: the broadcast.
    trained: where training left it. shown: `trained` in what is sent, `start` elsewhere.
    active: present and finite. raw_weights: of the clients in the average, before who is absent is left out.
    """

    ids: Array
    present: Array
    own: ClientState
    scope: Scope
    start: Adapters
    downlink_bits: Array
    trained: Trained
    shown: Adapters
    active: Array
    finite: Array
    raw_weights: Array

    @property
    def weights(self) -> Array:
        """`[C]` weights of those who trained, which sum to 1."""
        return normalised(self.raw_weights * self.active)


def train_round(parts: Parts, world: World, state: FedState, keys: RoundKeys) -> Cohort:
    """Choose the cohort and train it; who diverged is left out, with the broadcast in its place."""
    size = padded_size(parts.cohort_size, parts.chunk, parts.mesh.size)
    ids, present = choose(keys.cohort, world.data.count.shape[0], parts.cohort_size, size)
    own = trees.take(state.clients, ids)
    masks = jax.vmap(rank_mask, (0, None))(own.rank, max_rank(state.adapters))
    scope = Scope(masks, *map(jnp.float32, parts.aggregator.sends(state.round)))
    start, downlink_bits = jax.vmap(parts.sparsifier.broadcast, (None, CLIENT_SCOPE), (None, 0))(state.adapters, scope)
    clients = Client(world.data.index[ids], world.data.count[ids], client_keys(keys.local, ids), own)
    trained = train_cohort(parts, world, state, start, clients)
    finite = jax.vmap(trees.all_finite)(trained.adapters)
    active = present & finite
    trained = trained._replace(adapters=keep_where(active, trained.adapters, start))
    return Cohort(
        ids=ids,
        present=present,
        own=own,
        scope=scope,
        start=start,
        downlink_bits=downlink_bits + jnp.uint32(parts.extra_downlink_bits),
        trained=trained,
        shown=jax.vmap(Scope.select, (CLIENT_SCOPE, 0, None))(scope, trained.adapters, start),
        active=active,
        finite=finite,
        raw_weights=parts.client_weight(clients.examples),
    )


def aggregate_sent(parts: Parts, state: FedState, cohort: Cohort, sent: Sent, arrived: Array, key: Array) -> Aggregate:
    """What the server makes of what arrived."""
    held, received = (jax.vmap(own_product)(x, cohort.scope.ranks) for x in (cohort.shown, sent.adapters))
    return parts.aggregator.aggregate(
        cohort.start,
        held,
        dataclasses.replace(sent, adapters=received),
        normalised(cohort.raw_weights * arrived),
        state.hyper.alpha / state.hyper.rank,
        key,
    )


def advance(
    parts: Parts, state: FedState, cohort: Cohort, aggregate: Aggregate, memory: Any, arrived: Array
) -> FedState:
    """The state after the round, as far as training goes: the server's step, and what the clients carry on."""
    start, trained = cohort.start, cohort.trained
    pseudo_gradient = jax.tree.map(jnp.subtract, start, aggregate.adapters)
    updates, server = parts.optimizer.update(pseudo_gradient, state.server, state.adapters)
    # Momentum would move what is at rest in this round.
    shared = dataclasses.replace(cohort.scope, ranks=rank_mask(state.hyper.rank, max_rank(start)))
    updates = shared.select(updates, jax.tree.map(jnp.zeros_like, start))
    moved = ClientState(
        rank=jax.vmap(parts.aggregator.next_rank)(trained.adapters, cohort.own.rank),
        kept=jax.vmap(lambda adapters: extract(adapters, parts.aggregator.keeps))(trained.adapters),
        memory=memory,
        drift=trained.drift,
    )
    clients_after = scatter(state.clients, cohort.ids, arrived, moved, cohort.own)
    return dataclasses.replace(
        state,
        round=state.round + 1,
        adapters=jax.tree.map(jnp.add, state.adapters, updates),  # whole, also where the broadcast was not
        server=server,
        merged=jax.tree.map(jnp.add, state.merged, aggregate.merged),
        drift=parts.drift.next_server(state.drift, mean_change(clients_after.drift, state.clients.drift)),
        clients=clients_after,
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


def mean_over(included: Array) -> Callable[[Array], Array]:
    """A mean over the included clients; NaN ("not measured") where there are none."""
    number = jnp.sum(included)

    def mean(value: Array) -> Array:
        total = jnp.sum(jnp.where(included, value, 0.0))
        return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)

    return mean


def round_latency(delivery: Delivery, active: Array) -> Array:
    """Seconds until the last upload ended; who diverged or can never be heard is not waited for."""
    heard = active & jnp.isfinite(delivery.latency_s)
    return jnp.max(jnp.where(heard, delivery.latency_s, 0.0))


def scatter(memory, ids: Array, arrived: Array, new, old):
    """All clients' memory `[K, ...]` with the rows of those who were heard replaced."""
    rows = trees.where(arrived, new, old)
    return jax.tree.map(lambda whole, row: whole.at[ids].set(row, mode="drop"), memory, rows)
