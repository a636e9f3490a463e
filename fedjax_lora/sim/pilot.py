"""The pilot: a few rounds of federated training in full, at one structural rank, that measure what the bound needs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.base import Adapters, Base, Factors, FedState, Hyper, Scope
from fedjax_lora.control import bound
from fedjax_lora.data.batches import evaluation_batches, gather
from fedjax_lora.lora.adapters import add_to_base, effective, rank_mask
from fedjax_lora.prng import round_keys
from fedjax_lora.sim.local import cross_entropy, max_rank
from fedjax_lora.sim.parts import Cohort, Local, Parts, Uplink, World
from fedjax_lora.sim.round import advance, average, choose_cohort, normalised, sparsify, train_locally
from fedjax_lora.strategies import Aggregate, Decision, Delivery, Live, Model

SAMPLE = 512
"""Training examples that the loss and its gradient are measured on: the same ones in every round, at every rank."""


class Pilot(NamedTuple):
    """What a pilot measures at one structural rank; a leading axis of candidates where it is mapped.

    measured: what the bound needs.
    rank: r.
    weights: `[C]` of the clients, which sum to 1.
    tail_energy: `[C, R + 1]` of `Sparsifier.tail_energy`, mean over the rounds.
    payload_bits: `[R + 1]` uplink bits of a client that keeps 0 ... R ranks; 0 cost what 1 does.
    downlink_bits: of the broadcast.
    sparsification, covariance: `[R + 1]` mean squares of the two errors where each client keeps 0 ... R ranks.
    loss: `[rounds + 2]` of the sample, before each round and at the end.
    """

    measured: bound.Measured
    rank: Array
    weights: Array
    tail_energy: Array
    payload_bits: Array
    downlink_bits: Array
    sparsification: Array
    covariance: Array
    loss: Array


class Gradient(NamedTuple):
    """By all that training may move: module name -> `[L, n_in, n_out]` of its weights, and the head's leaves."""

    modules: dict[str, Array]
    head: dict[str, Array]


FullGradient = Callable[[Base, Mapping[str, Array], Adapters, Hyper], tuple[Array, Gradient]]


def make_full_gradient(model: Model, batch_size: int) -> FullGradient:
    """`(base, pool, adapters, hyper) -> (mean cross-entropy of the pool, Gradient)`, a batch at a time, no dropout."""

    def full_gradient(
        base: Base, pool: Mapping[str, Array], adapters: Adapters, hyper: Hyper
    ) -> tuple[Array, Gradient]:
        num_examples = pool["label"].shape[0]
        used = effective(adapters, rank_mask(hyper.rank, max_rank(adapters)), hyper.alpha / hyper.rank)
        nothing = {name: jnp.zeros((*f.a.shape[:2], f.b.shape[2])) for name, f in used.modules.items()}

        def loss(moved: Gradient, rows: Array, weight: Array) -> Array:
            batch = gather(pool, rows)
            logits = model.apply(
                add_to_base(base, moved.modules, model.targets), Adapters(used.modules, moved.head), batch
            )
            return cross_entropy(logits, batch["label"], weight) * jnp.sum(weight) / num_examples

        def add(total: tuple[Array, Gradient], batch: tuple[Array, Array]):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(start, *batch)), None

        start = Gradient(nothing, used.head)
        batches = evaluation_batches(num_examples, batch_size, -(-num_examples // batch_size))
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, start)
        return lax.scan(add, zero, jax.tree.map(jnp.asarray, batches))[0]

    return full_gradient


def sample_of(world: World, parts: Parts, key: Array) -> dict[str, Array]:
    """SAMPLE training examples, drawn as the average weighs them: a client by its weight, then one of its own."""
    data = world.data
    client_key, row_key = jax.random.split(key)
    clients = jax.random.categorical(client_key, jnp.log(parts.client_weight(data.count)), shape=(SAMPLE,))
    position = jax.random.randint(row_key, (SAMPLE,), 0, data.count[clients])
    return gather(data.train, data.index[clients, position])


def at_rank(state: FedState, rank: Array) -> FedState:
    """The state with this structural rank for all."""
    hyper = dataclasses.replace(state.hyper, rank=rank)
    clients = dataclasses.replace(state.clients, rank=jnp.full_like(state.clients.rank, rank))
    return dataclasses.replace(state, hyper=hyper, clients=clients)


class _Step(NamedTuple):
    """What one round of a pilot shows."""

    loss: Array
    gradient_sq: Array
    followed_sq: Array
    progress: Array
    movement: Array
    slope: Array
    distance_sq: Array
    sparsification_slope: Array
    covariance_slope: Array
    weights: Array
    tail_energy: Array
    sparsification: Array
    covariance: Array


def make_pilot(parts: Parts, full_gradient: FullGradient, rounds: int):
    """`(world, sample, state, rank) -> Pilot`: the rounds of a run in which everything is sent and arrives.

    One round more than `rounds` goes before, of which only the loss at the start is used: with b still 0, half of
    what the adapters can follow is missing, and a first step from there is like no other.
    """

    def pilot(world: World, sample: Mapping[str, Array], state: FedState, rank: Array) -> Pilot:
        def step(state: FedState, _: None) -> tuple[FedState, _Step]:
            return _measure(parts, full_gradient, world, sample, state)

        start = at_rank(state, rank)
        end, every = lax.scan(step, start, length=1 + rounds)
        steps = jax.tree.map(lambda x: x[1:], every)
        last, _ = full_gradient(parts.current_base(world, end), sample, end.adapters, end.hyper)
        loss = jnp.append(every.loss, last)
        progress, followed_sq, gradient_sq = (
            jnp.sum(x) for x in (steps.progress, steps.followed_sq, steps.gradient_sq)
        )
        bits, downlink_bits = _payloads(parts, start)
        return Pilot(
            measured=bound.Measured(
                gap=loss[0],
                smoothness=bound.smoothness(loss[1:], steps.slope, steps.distance_sq),
                share=followed_sq / gradient_sq,
                step=progress / followed_sq,
                movement=jnp.mean(steps.movement),
                against_sparsification=bound.share_against(
                    steps.sparsification_slope, steps.gradient_sq[:, None], steps.sparsification
                ),
                against_covariance=bound.share_against(
                    steps.covariance_slope, steps.gradient_sq, steps.covariance[:, -1]
                ),
            ),
            rank=rank,
            weights=steps.weights[-1],
            payload_bits=bits,
            downlink_bits=downlink_bits,
            loss=loss,
            **{name: getattr(steps, name).mean(0) for name in ("tail_energy", "sparsification", "covariance")},
        )

    return pilot


def _measure(
    parts: Parts, full_gradient: FullGradient, world: World, sample: Mapping[str, Array], state: FedState
) -> tuple[FedState, _Step]:
    """One round without a network, and what it shows."""
    keys, hyper = round_keys(state.key, state.round), state.hyper
    scale, num_ranks = hyper.alpha / hyper.rank, max_rank(state.adapters)
    loss, gradient = full_gradient(parts.current_base(world, state), sample, state.adapters, hyper)
    cohort = choose_cohort(parts, world, state, keys)
    local = train_locally(parts, world, state, cohort)
    weights, mask = normalised(local.weight * local.active), rank_mask(hyper.rank, num_ranks)

    def at(kept: Array) -> tuple[Uplink, Aggregate]:
        """The cohort's round where each client keeps so many ranks."""
        uplink = _all_heard(parts, cohort, local, jnp.minimum(kept / hyper.rank, 1.0), keys.sparsify)
        return uplink, average(parts, state, cohort, local, uplink, keys.aggregate)

    def tail_energy(shown: Adapters, ranks: Array) -> Array:
        return parts.sparsifier.tail_energy(cohort.start, shown, cohort.scope(ranks))

    def moved_by(adapters: Adapters, merged: dict[str, Array]) -> Gradient:
        return _movement(cohort.start, adapters, merged, mask, scale)

    def errors_at(kept: Array) -> tuple[Array, Array, Array]:
        _, found = at(kept)
        slope = _dot(gradient, moved_by(found.adapters, found.merged))
        return jnp.square(found.sparsification_error), jnp.square(found.covariance_error), slope

    uplink, whole = at(jnp.float32(num_ranks))
    *energies, slopes = lax.map(errors_at, jnp.arange(1.0, num_ranks + 1.0))
    sparsification, covariance, slopes = (jnp.append(x[:1], x) for x in (*energies, slopes))  # 0 ranks are 1
    new_state = advance(parts, state, cohort, local, uplink, whole)
    ideal = _average_movement(cohort, local, weights, mask, scale)
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
        sparsification_slope=slopes - slopes[-1],
        covariance_slope=slopes[-1] - _dot(gradient, ideal),
        distance_sq=_dot(moved, moved),
        weights=weights,
        tail_energy=jax.vmap(tail_energy)(local.shown, cohort.ranks),
        sparsification=sparsification,
        covariance=covariance,
    )


def _all_heard(parts: Parts, cohort: Cohort, local: Local, keep_ratio: Array, key: Array) -> Uplink:
    """Steps 6 and 7 with one keep ratio for all and no network between."""
    nothing = jnp.zeros(local.active.shape)
    decision = Decision(jnp.full_like(nothing, keep_ratio), nothing, jnp.zeros(()), jnp.zeros(()))
    sent, memory = sparsify(parts, cohort, local, decision, key)
    delivery = Delivery(latency_s=nothing, energy_j=nothing, delivered=cohort.present)
    return Uplink(decision, sent, memory, delivery, arrived=local.active, latency_s=jnp.zeros(()))


def _payloads(parts: Parts, state: FedState) -> tuple[Array, Array]:
    """Uplink bits `[R + 1]` of 0 ... R kept ranks, and those of the broadcast."""
    num_ranks = max_rank(state.adapters)
    ranks = rank_mask(state.hyper.rank, num_ranks)
    scope = Scope(ranks, *map(jnp.float32, parts.aggregator.sends(state.round)))
    later = parts.receives(state.round + 1)  # the first broadcast is not like the others
    received = Scope(ranks, *map(jnp.float32, later))
    kept = jnp.clip(jnp.arange(num_ranks + 1.0), 1.0, state.hyper.rank)
    drift_bits = parts.drift_bits(scope)
    bits = parts.sparsifier.payload_bits(kept / state.hyper.rank, scope) + drift_bits
    _, downlink_bits = parts.sparsifier.broadcast(state.adapters, received, ranks)
    return bits.astype(jnp.float32), downlink_bits + drift_bits + parts.extra_downlink_bits(state.hyper.rank)


def _average_movement(cohort: Cohort, local: Local, weights: Array, mask: Array, scale: Array) -> Gradient:
    """`sum_k p_k s (a_k b_k - a b)`, and the heads' average change: what an ideal server would do."""
    p, start, modules = weights, cohort.start, {}
    for name, old in start.modules.items():
        new = local.shown.modules[name]
        b = new.b * mask[:, None]
        by_a = jnp.einsum("c,clir,clro->lio", p, (new.a - old.a) * mask, b, precision="highest")
        by_b = jnp.einsum("lir,lro->lio", old.a * mask, jnp.einsum("c,clro->lro", p, b - old.b), precision="highest")
        modules[name] = scale * (by_a + by_b)
    head = jax.tree.map(lambda new, old: jnp.einsum("c,c...->...", p, new - old), local.shown.head, start.head)
    return Gradient(modules, head)


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
