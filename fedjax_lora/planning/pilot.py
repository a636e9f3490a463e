"""The pilot: a few rounds of federated training in full, at one structural rank, that measure what the bound needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.aggregation.fedit import average_head
from fedjax_lora.aggregation.products import by_products
from fedjax_lora.core import trees
from fedjax_lora.core.exchange import Aggregate, Enter, Live
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.network import Decision, Delivery
from fedjax_lora.core.types import Adapters, Factors, FedState
from fedjax_lora.data.batches import gather
from fedjax_lora.planning import bound
from fedjax_lora.sim.full_gradient import FullGradient, Gradient
from fedjax_lora.sim.merged import current_base
from fedjax_lora.sim.parts import Cohort, Local, MakeParts, Parts, Uplink, World, scope_of
from fedjax_lora.sim.round import advance, average, importance, sparsify, train_locally
from fedjax_lora.sim.selection import broadcast, choose_cohort, correction_bits, normalised
from fedjax_lora.sparsifiers import payload

SAMPLE = 512
"""Training examples that the loss and its gradient are measured on: the same ones in every round, at every rank."""


class Pilot(NamedTuple):
    """What a pilot measures at one structural rank; a leading axis of candidates where it is mapped.

    measured: what the bound needs.
    rank: r.
    weights: `[C]` by place in the cohort, mean over the rounds, which sum to 1.
    tail_energy: `[C, R + 1]` of `Offer` likewise.
    bits: `[R + 1]` of the uplink of a client that keeps 0 ... R ranks; 0 cost what 1 does.
    downlink_bits: of the broadcast.
    sparsification, covariance: `[R + 1]` mean squares of the two errors where each client keeps 0 ... R ranks, at the
      peak of the learning rate: that of E_s falls with its factor's square, that of Cov with the fourth power.
    loss: `[rounds + 2]` of the sample, before each round and at the end.
    """

    measured: bound.Measured
    rank: Array
    weights: Array
    tail_energy: Array
    bits: Array
    downlink_bits: Array
    sparsification: Array
    covariance: Array
    loss: Array


def sample_of(world: World, parts: Parts, key: Array) -> dict[str, Array]:
    """SAMPLE training examples, drawn as the average weighs them: a client by its weight, then one of its own."""
    data = world.data
    client_key, row_key = jax.random.split(key)
    clients = jax.random.categorical(client_key, jnp.log(parts.client_weight(data.count)), shape=(SAMPLE,))
    position = jax.random.randint(row_key, (SAMPLE,), 0, data.count[clients])
    return gather(data.train, data.index[clients, position])


def at_rank(state: FedState, rank: Array) -> FedState:
    """The state with this structural rank for all."""
    numbers = {**state.numbers, "lora.rank": jnp.asarray(rank, jnp.float32)}
    clients = dataclasses.replace(state.clients, rank=jnp.full_like(state.clients.rank, rank))
    return dataclasses.replace(state, numbers=numbers, clients=clients)


class _Error(NamedTuple):
    """One of the two errors where each client keeps 1 ... R ranks, `[R]`.

    norm_sq: as the aggregator reports it. slope: of the loss along the error. energy: of the error that the slope is
    of; it is `norm_sq` up to rounding where the factors are averaged apart. Both are 0 beyond the structural rank.
    """

    norm_sq: Array
    slope: Array
    energy: Array


class _Step(NamedTuple):
    """What one round of a pilot shows."""

    loss: Array
    gradient_sq: Array
    followed_sq: Array
    progress: Array
    movement: Array
    slope: Array
    distance_sq: Array
    weights: Array
    tail_energy: Array
    sparsification: _Error
    covariance: _Error


def make_pilot(make_parts: MakeParts, full_gradient: FullGradient, factors: Array):
    """`(world, sample, state, rank) -> Pilot`: the rounds of a run in which everything is sent and arrives.

    factors: `[1 + rounds]`, the learning rate of each round over its peak. Of the first round only the loss at the
    start is used: with b still 0, half of what the adapters can follow is missing, and a first step from there is
    like no other.
    """
    phi = factors[1:]

    def pilot(world: World, sample: Mapping[str, Array], state: FedState, rank: Array) -> Pilot:
        start = at_rank(state, rank)
        parts = make_parts(start.numbers)
        parts = parts._replace(layout=parts.layout._replace(all_at_once=True))  # it is about what errors there are

        def step(state: FedState, _: None) -> tuple[FedState, _Step]:
            return _measure(parts, full_gradient, world, sample, state)

        end, every = lax.scan(step, start, length=len(factors))
        steps = jax.tree.map(lambda x: x[1:], every)
        last, _ = full_gradient(current_base(parts, world, end), sample, end.adapters, parts.rank, parts.scale)
        loss = jnp.append(every.loss, last)
        bits, downlink_bits = _payloads(parts, start)

        def against(error: _Error) -> Array:
            return bound.share_against(error.slope, steps.gradient_sq[:, None], error.energy)

        def at_peak(energy: Array, order: int) -> Array:
            """Mean energy of something of this order in the learning rate."""
            return jnp.sum(energy, 0) / jnp.sum(phi ** (2 * order))

        return Pilot(
            measured=bound.Measured(
                gap=loss[0],
                smoothness=bound.smoothness(loss[1:], steps.slope, steps.distance_sq),
                share=jnp.sum(steps.followed_sq) / jnp.sum(steps.gradient_sq),
                step=jnp.sum(steps.progress) / jnp.sum(phi * steps.followed_sq),
                movement=at_peak(steps.movement, 1),
                against_sparsification=against(steps.sparsification),
                against_covariance=against(steps.covariance),
            ),
            rank=rank,
            weights=jnp.mean(steps.weights, 0),
            tail_energy=jnp.mean(steps.tail_energy, 0),
            bits=bits,
            downlink_bits=downlink_bits,
            sparsification=_from_zero(at_peak(steps.sparsification.norm_sq, 1)),
            covariance=_from_zero(at_peak(steps.covariance.norm_sq, 2)),
            loss=loss,
        )

    return pilot


def _measure(
    parts: Parts, full_gradient: FullGradient, world: World, sample: Mapping[str, Array], state: FedState
) -> tuple[FedState, _Step]:
    """One round without a network, and what it shows."""
    keys, num_ranks, scale = round_keys(state.key, state.round), max_rank(state.adapters), parts.scale
    loss, gradient = full_gradient(current_base(parts, world, state), sample, state.adapters, parts.rank, scale)
    cohort = choose_cohort(parts, world, state, keys)
    local = train_locally(parts, world, state, cohort)
    weights, mask = normalised(local.weight * local.active), rank_mask(parts.rank, num_ranks)

    def at(kept: Array) -> tuple[Uplink, Aggregate]:
        """The cohort's round where each client keeps so many ranks."""
        uplink = _all_heard(parts, cohort, local, jnp.minimum(kept, parts.rank), keys.sparsify)
        return uplink, average(parts, cohort, local, uplink, keys.aggregate)

    def errors_at(kept: Array) -> tuple[_Error, _Error]:
        uplink, found = at(kept)
        received = uplink.upload.received
        assert received is not None  # all are held
        decoded = _mean_movement(
            parts.aggregator.enter, cohort.start, received.adapters, received.counted, weights, mask, scale
        )
        server = _movement(cohort.start, found.adapters, found.merged, mask, scale)
        here = kept <= parts.rank

        def error(norm: Array, of: Gradient, instead: Gradient) -> _Error:
            missed = jax.tree.map(jnp.subtract, of, instead)
            return _Error(jnp.square(norm), here * _dot(gradient, missed), here * _dot(missed, missed))

        return error(found.sparsification_error, decoded, ideal), error(found.covariance_error, server, decoded)

    everything = {name: jnp.ones((*f.a.shape[:2], num_ranks)) for name, f in local.shown.modules.items()}
    ideal = _mean_movement(by_products, cohort.start, local.shown, everything, weights, mask, scale)
    uplink, whole = at(jnp.float32(num_ranks))
    sparsification, covariance = lax.map(errors_at, jnp.arange(1.0, num_ranks + 1.0))
    new_state, _ = advance(parts, state, cohort, local, uplink, whole)
    merged = jax.tree.map(jnp.subtract, new_state.merged, state.merged)
    moved = _movement(state.adapters, new_state.adapters, merged, mask, scale)
    live = Live(*map(jnp.float32, parts.aggregator.trains(state.round)))
    return new_state, _Step(
        loss=loss,
        gradient_sq=_dot(gradient, gradient),
        followed_sq=_followed(gradient, state.adapters, mask, live),
        progress=-_dot(gradient, ideal),
        movement=_dot(ideal, ideal),
        slope=_dot(gradient, moved),
        distance_sq=_dot(moved, moved),
        weights=weights,
        tail_energy=importance(parts, cohort, local).tail_energy,
        sparsification=sparsification,
        covariance=covariance,
    )


def _all_heard(parts: Parts, cohort: Cohort, local: Local, kept: Array, key: Array) -> Uplink:
    """Steps 6 and 7 where each client keeps so many ranks, with no network between."""
    nothing = jnp.zeros(local.active.shape)
    decision = Decision(kept=jnp.full_like(nothing, kept), share_hz=nothing)
    upload = sparsify(parts, cohort, local, decision.kept, key)
    delivery = Delivery(latency_s=nothing, energy_j=nothing, delivered=cohort.present)
    return Uplink(decision, upload, delivery, arrived=local.active, latency_s=jnp.zeros(()))


def _payloads(parts: Parts, state: FedState) -> tuple[Array, Array]:
    """Uplink bits `[R + 1]` of 0 ... R kept ranks, and those of the broadcast.

    Means of two rounds, in which the factors may take turns; not of the first, whose broadcast is like no other.
    """
    ranks, adapters = rank_mask(parts.rank, max_rank(state.adapters)), state.adapters

    def of(round_number: Array) -> tuple[Array, Array]:
        scope = scope_of(ranks, parts.aggregator.traffic(round_number, parts.layout.everyone).sent)
        offer = parts.sparsifier.offer(adapters, adapters, scope)
        bits = payload.bits(offer.size, parts.transforms) + correction_bits(parts, adapters, scope)
        _, downlink = broadcast(parts, dataclasses.replace(state, round=round_number), ranks[None])
        return bits.float32(), downlink.float32()[0]

    return jax.tree.map(lambda *both: sum(both) / 2, of(state.round + 1), of(state.round + 2))


def _mean_movement(
    enter: Enter, start: Adapters, held: Adapters, counted: dict[str, Array], weights: Array, mask: Array, scale: Array
) -> Gradient:
    """`s sum_ki w_ki (a_ki b_ki - a_i b_i)`, and the heads' average change: what averaging products would do.

    held: `[C, ...]`, what the clients have or what is decoded of it. counted: module -> `[C, L, R]`, see `Received`.
    """
    modules = {}
    for name, old in start.modules.items():
        own = trees.where(weights > 0, held.modules[name], jax.tree.map(jnp.zeros_like, held.modules[name]))
        say = jnp.where(weights[:, None, None] > 0, counted[name], 0.0)
        new, w = jax.vmap(enter, (0, 1, 1, None))(old, own, say, weights)
        w = w * mask
        by_a = jnp.einsum("lcir,lcro->lio", w[:, :, None] * (new.a - old.a[:, None]), new.b, precision="highest")
        of_b = jnp.sum(w[..., None] * (new.b - old.b[:, None]), 1)
        by_b = jnp.einsum("lir,lro->lio", old.a, of_b, precision="highest")
        modules[name] = scale * (by_a + by_b)
    head = average_head(start.head, held.head, weights)
    return Gradient(modules, jax.tree.map(jnp.subtract, head, start.head))


def _from_zero(table: Array) -> Array:
    """`[R + 1]` of a table at 1 ... R kept ranks: 0 ranks are 1."""
    return jnp.append(table[:1], table)


def _movement(old: Adapters, new: Adapters, merged: dict[str, Array], mask: Array, scale: Array) -> Gradient:
    """What the server's weights did."""
    modules = {}
    for name, before in old.modules.items():
        used = [Factors(a=f.a * mask, b=f.b * mask[:, None]) for f in (before, new.modules[name])]
        modules[name] = scale * bound.product_change(*used) + merged.get(name, 0.0)
    return Gradient(modules, jax.tree.map(jnp.subtract, new.head, old.head))


def _followed(gradient: Gradient, adapters: Adapters, mask: Array, live: Live) -> Array:
    """Energy of the gradient's part that what is trained can follow to first order; the head follows its own."""
    total = live.head * _dot(gradient.head, gradient.head)
    for name, g in gradient.modules.items():
        f = adapters.modules[name]
        total += jnp.sum(bound.followed_energy(f.a * mask * live.b, f.b * mask[:, None] * live.a, g))
    return total


def _dot(x: Any, y: Any) -> Array:
    return sum((jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)), jnp.zeros(()))
