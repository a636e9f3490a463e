"""One round, top to bottom: channel, cohort, training, control, sparsification, transmission, aggregation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.aggregation.products import as_changes
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Aggregate, Live
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.learning import Broadcast, Client, Trained, Trainer
from fedjax_lora.core.network import Decision, Delivery, Observation, Outcome
from fedjax_lora.core.types import Adapters, ClientState, FedState, Metrics
from fedjax_lora.sim.merged import current_base
from fedjax_lora.sim.messages import average_one_by_one, importance, own_product, sparsify
from fedjax_lora.sim.metrics import observe
from fedjax_lora.sim.parts import Arrivals, Cohort, Local, MakeParts, Offers, Parts, Uplink, Upload, World
from fedjax_lora.sim.running import begin, begin_again, first_to_end, rebased
from fedjax_lora.sim.selection import choose_cohort, draw_channel, normalised, seen_alone, waited_s
from fedjax_lora.training.personal import extract

RoundFn = Callable[[World, FedState], tuple[FedState, Metrics]]


def make_round(make_parts: MakeParts) -> RoundFn:
    """`(world, state) -> (state, metrics)`: one round of federated LoRA over the simulated cell."""

    def round_fn(world: World, state: FedState) -> tuple[FedState, Metrics]:
        parts, keys = make_parts(state.numbers), round_keys(state.key, state.round)

        # 1. Draw the channel, and 2. choose the cohort, and broadcast to it; or take those who end first.
        if parts.layout.running is None:
            state = draw_channel(parts, state, keys.channel, seen_alone(parts, state, keys))
            cohort = choose_cohort(parts, world, state, keys)
        else:
            state = begin(parts, world, state, keys)
            cohort = first_to_end(parts, world, state, keys)

        # 3. Train locally; who diverged is left out from here on.
        local = train_locally(parts, world, state, cohort)

        # 4. Importance of each rank, and 5. control of kept ranks and bandwidth.
        offers = importance(parts, cohort, local)
        decision = control(parts, cohort, local, offers)

        # 6. Sparsify, and 7. transmit.
        upload = sparsify(parts, cohort, local, decision.kept, keys.sparsify)
        uplink = transmit(parts, cohort, local, decision, upload)

        # 8. Aggregate, step the server, update the controller.
        if parts.layout.all_at_once:
            aggregate = average(parts, cohort, local, uplink, keys.aggregate)
        else:
            aggregate = average_one_by_one(parts, cohort, local, uplink, keys.sparsify)
        after, report = advance(parts, state, cohort, local, uplink, aggregate)
        everyone = jnp.sum(parts.client_weight(world.data.count))
        return after, observe(after, cohort, local, offers, uplink, aggregate, report, everyone)

    return round_fn


def train_locally(parts: Parts, world: World, state: FedState, cohort: Cohort) -> Local:
    """Step 3: local training, with what diverged or is padding put back to the broadcast."""
    here = cohort.present & (cohort.radio.snr_hz > 0)
    if cohort.arrivals is None:
        trained, finite = train_cohort(parts, world, state, cohort.start, cohort.clients, here, cohort.present)
    else:
        trained, finite = train_apart(parts, world, state, cohort, cohort.arrivals)
    starts, axis = started(cohort)
    adapters = trained.adapters
    shown = adapters
    if parts.aggregator.personal:  # else what a client holds is what it sends, and a copy is saved
        within = jax.vmap(lambda own, start, ranks: cohort.scope(ranks).select(own, start), (0, axis, 0))
        shown = within(adapters, starts, cohort.ranks)
    return Local(
        trained=trained,
        shown=shown,
        finite=finite,
        active=cohort.present & finite,
        weight=parts.client_weight(cohort.clients.examples),
    )


def train_cohort(
    parts: Parts, world: World, state: FedState, start: Adapters, clients: Client, here: Array, present: Array
) -> tuple[Trained, Array]:
    """Local training of every client of the cohort: leaves `[C, ...]`, and who is `finite`, see `Local`.

    Who is not here is nothing to the others; who is not present, or diverged, ends with the broadcast.
    """
    given = given_to(parts, world, state, start)
    if parts.trainer.together is not None:
        return jax.vmap(unless_diverged, (0, None, 0))(parts.trainer.together(given, clients, here), start, present)

    def train(given: Broadcast, item: tuple[Client, Array]) -> tuple[Trained, Array]:
        client, present = item
        return unless_diverged(parts.trainer.train(given, client), given.adapters, present)

    return parts.layout.map(train, given, (clients, present), parts.layout.chunk, of_model=True)


def train_apart(
    parts: Parts, world: World, state: FedState, cohort: Cohort, arrivals: Arrivals
) -> tuple[Trained, Array]:
    """`train_cohort` of clients that each started from a model, and in a round, of its own."""

    def train(given: Broadcast, item: tuple[Client, Adapters, Array, Array]) -> tuple[Trained, Array]:
        client, start, number, present = item
        trained = parts.trainer.train(given._replace(adapters=start, round=number), client)
        return unless_diverged(trained, start, present)

    items = cohort.clients, arrivals.starts, arrivals.version, cohort.present
    given = given_to(parts, world, state, cohort.start)
    return parts.layout.map(train, given, items, parts.layout.chunk, of_model=True)


def unless_diverged(trained: Trained, start: Adapters, present: Array) -> tuple[Trained, Array]:
    """What one client ends with, and whether it is finite; what it started from if it is not, or the client absent.

    Here, and not of all clients after their training: that would be a copy of what they hold.
    """
    finite = trees.fits_float32(trained.adapters)
    return trained._replace(adapters=trees.where(present & finite, trained.adapters, start)), finite


def given_to(parts: Parts, world: World, state: FedState, start: Adapters) -> Broadcast:
    """What every client is given that starts from these adapters."""
    return Broadcast(
        base=current_base(parts, world, state),
        pool=world.data.train,
        adapters=start,
        live=Live(*map(jnp.float32, parts.aggregator.trains(state.round))),
        correction=state.methods["drift"],
        scale=parts.scale,
        round=state.round,
    )


def control(parts: Parts, cohort: Cohort, local: Local, offers: Offers) -> Decision:
    """Step 5: kept ranks and bandwidth of each client, as the controller has it, or had when the client began."""
    if cohort.arrivals is not None:
        return cohort.arrivals.decision
    observation = Observation(
        radio=cohort.radio,
        weights=normalised(local.weight * local.active),
        rank=cohort.clients.rank,
        tail_energy=offers.tail_energy,
        bits=offers.bits if cohort.work.up_bits is None else offers.bits + cohort.work.up_bits[:, None],
        whole_ranks=parts.sparsifier.whole_ranks,
    )
    return parts.controller.allocate(cohort.controller, observation)


def transmit(parts: Parts, cohort: Cohort, local: Local, decision: Decision, upload: Upload) -> Uplink:
    """Step 7: who is heard, and when the round ends."""
    bits = upload.bits.float32() if parts.controller.over_the_air else jnp.zeros(cohort.ids.shape)
    bits = bits if cohort.work.up_bits is None else bits + cohort.work.up_bits
    if parts.trainer.in_turn:
        decision = decision._replace(share_hz=jnp.where(cohort.present, cohort.radio.band_hz, 0.0))
    delivery = parts.wireless.deliver(
        cohort.wireless, cohort.work, bits, decision.share_hz, cohort.radio.start_s, cohort.present
    )
    if parts.trainer.overlapping > 1:
        delivery = delivery._replace(latency_s=overlapped_s(parts.trainer, cohort, bits, delivery))
    return Uplink(
        decision=decision,
        upload=upload,
        delivery=delivery,
        arrived=local.active & delivery.delivered,
        latency_s=cohort.arrivals.waited_s
        if cohort.arrivals
        else round_latency(delivery, local.active, parts.trainer.in_turn),
    )


def average(parts: Parts, cohort: Cohort, local: Local, uplink: Uplink, key: Array) -> Aggregate:
    """Step 8, as the aggregator has it."""
    received = uplink.upload.received
    assert received is not None  # all are held for this
    held, received = rebased(cohort, local.shown, received)
    if not parts.layout.one_rank:  # else b is zero beyond the ranks in use, and two copies are saved
        held, theirs = (jax.vmap(own_product)(adapters, cohort.ranks) for adapters in (held, received.adapters))
        received = dataclasses.replace(received, adapters=theirs)
    if parts.aggregator.resumes:
        held, received = as_changes(cohort.clients.methods["aggregation"], held, received)
    weights = normalised(local.weight * uplink.arrived)
    scale = parts.layer_scales or parts.scale
    return parts.aggregator.aggregate(cohort.start, held, received, weights, scale, key)


def advance(
    parts: Parts, state: FedState, cohort: Cohort, local: Local, uplink: Uplink, aggregate: Aggregate
) -> tuple[FedState, dict[str, Array]]:
    """The state after the round, which holds its channel already, and the controller's report."""
    adapters, server = step_server(parts, state, cohort, aggregate)
    clients = remember(parts, state, cohort, local, uplink)
    mean_energy_j = jnp.sum(uplink.delivery.energy_j) / jnp.maximum(jnp.sum(cohort.present), 1)
    outcome = Outcome(latency_s=uplink.latency_s, energy_j=mean_energy_j)
    controller, report = parts.controller.update(cohort.controller, outcome)
    change = mean_change(clients.methods["drift"], state.clients.methods["drift"])
    correction = parts.correction.next_server(state.methods["drift"], change)
    after = dataclasses.replace(
        state,
        round=state.round + 1,
        adapters=adapters,
        merged=jax.tree.map(jnp.add, state.merged, aggregate.merged),
        elapsed_s=state.elapsed_s + uplink.latency_s,
        methods={
            **state.methods,
            "control": controller,
            "server": server,
            "drift": correction,
            "training": parts.trainer.hold(state.methods["training"], cohort.clients, uplink.arrived),
        },
        clients=clients,
    )
    running = begin_again(parts, state, after, cohort)
    return dataclasses.replace(after, methods={**after.methods, "arrival": running}), report


def step_server(parts: Parts, state: FedState, cohort: Cohort, aggregate: Aggregate) -> tuple[Adapters, Any]:
    """The new global adapters, and the server optimizer's state."""
    start = cohort.start
    pseudo_gradient = jax.tree.map(jnp.subtract, start, aggregate.adapters)
    updates, server = parts.server.update(pseudo_gradient, state.methods["server"], state.adapters)
    # Momentum would move what is at rest in this round.
    shared = cohort.scope(rank_mask(parts.rank, max_rank(start)))
    updates = shared.select(updates, jax.tree.map(jnp.zeros_like, start))
    # To the state's adapters, which are whole also where the broadcast was not.
    return jax.tree.map(jnp.add, state.adapters, updates), server


def remember(parts: Parts, state: FedState, cohort: Cohort, local: Local, uplink: Uplink) -> ClientState:
    """What all clients carry on; only for those of the cohort who were heard it is new."""
    own, trained, next_rank = cohort.clients, local.trained, parts.aggregator.next_rank
    starts, axis = started(cohort)
    new = ClientState(
        rank=jax.vmap(next_rank, (axis, 0, 0))(starts, trained.adapters, own.rank) if next_rank else own.rank,
        personal=extract(trained.adapters, parts.aggregator.personal),
        methods={
            "sparsifier": uplink.upload.memory,
            "drift": trained.correction,
            "aggregation": trained.adapters.modules if parts.aggregator.resumes else (),
        },
    )
    old = ClientState(rank=own.rank, personal=own.personal, methods=own.methods)
    rows = trees.where(uplink.arrived, new, old)
    return jax.tree.map(lambda whole, row: whole.at[cohort.ids].set(row, mode="drop"), state.clients, rows)


def mean_change(new: Any, old: Any) -> Any:
    """The mean over all K clients of how their states changed."""
    return jax.tree.map(lambda x, y: jnp.mean(x - y, axis=0), new, old)


def started(cohort: Cohort) -> tuple[Adapters, int | None]:
    """What the clients started from, and the axis of them: None where all started from the same."""
    return (cohort.start, None) if cohort.arrivals is None else (cohort.arrivals.starts, 0)


def overlapped_s(trainer: Trainer, cohort: Cohort, bits: Array, delivery: Delivery) -> Array:
    """`[C]` seconds at which each client ends whose steps overlap.

    Of its steps, which take equal times at the client, on the air and at the server, each of the three has its first
    while the others wait, and all go on at the pace of the slowest; the update follows at the end.
    """
    assert cohort.work.up_bits is not None  # what overlaps is an exchange
    start_s, steps = cohort.radio.start_s, trainer.overlapping
    server_s = jnp.where(cohort.present, waited_s(cohort.radio, cohort.present, trainer.in_turn), 0.0)
    upload_s = delivery.latency_s - start_s
    exchange_s = upload_s * cohort.work.up_bits / jnp.maximum(bits, 1.0)
    stages_s = jnp.stack([start_s - server_s, exchange_s, server_s])
    overlapped = (jnp.sum(stages_s, 0) + (steps - 1) * jnp.max(stages_s, 0)) / steps
    return jnp.where(jnp.isfinite(upload_s), overlapped + upload_s - exchange_s, delivery.latency_s)


def round_latency(delivery: Delivery, active: Array, in_turn: bool) -> Array:
    """Seconds until the last upload ended; who diverged or can never be heard is not waited for."""
    heard = active & jnp.isfinite(delivery.latency_s)
    each_s = jnp.where(heard, delivery.latency_s, 0.0)
    return jnp.sum(each_s) if in_turn else jnp.max(each_s)
