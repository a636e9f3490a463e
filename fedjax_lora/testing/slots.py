"""The laws of each slot, and what their general laws are tried on."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.methods import Aggregator, Context, Controller, Message, Outcome, Received, Sparsifier, Wireless
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Exercise, Law, Subject, close, named, rows, same_form

# ------------------------------------------------------------------------------------------------- sparsifiers


def _sent(
    method: Sparsifier, seed: int, kept: float, scope: Scope
) -> tuple[Adapters, Adapters, Any, Message, Received]:
    """Start, trained, memory, message and what arrives of a client that keeps so many ranks."""
    start = examples.adapters(0)
    trained = examples.trained(seed, start, scope)
    memory = method.init(start)
    message = method.encode(start, trained, memory, jnp.float32(kept), scope, jax.random.key(seed))
    return start, trained, memory, message, method.decode(start, message, scope)


def _sparsifier(method: Sparsifier, context: Context) -> Any:
    scope = examples.scope()
    start, trained, memory, message, received = _sent(method, 1, 2.0, scope)
    offer = method.offer(start, trained, scope)
    size = payload.message_size(message)
    memory = method.remember(trained, memory, received, scope)
    mask = scope.ranks
    bits = payload.bits(offer.size, ()).float32(), payload.bits(size, ()).float32()
    return received, memory, offer.tail_energy, bits, method.penalty(trained, mask), message.dropped_energy


def what_is_kept_whole_arrives_whole(subject: Subject) -> None:
    """The products of the received factors are those of the trained ones, where all ranks are kept."""
    _, trained, _, _, received = _sent(subject.record, 2, examples.RANK, examples.scope())
    mask = examples.scope().ranks
    for name, f in trained.modules.items():
        g = received.adapters.modules[name]
        close(g.a * mask @ g.b, f.a * mask @ f.b, rtol=1e-3, atol=1e-3)
    close(received.adapters.head, trained.head)


def what_is_out_of_scope_stays(subject: Subject) -> None:
    """A factor that is not sent, a rank not in use and a head out of scope are the server's own, to the bit."""
    for parts in ({"a": 0.0}, {"b": 0.0}, {"head": 0.0}):
        scope = examples.scope(**parts)
        start, _, _, _, received = _sent(subject.record, 3, 2.0, scope)
        nothing = jax.tree.map(jnp.zeros_like, start)
        for found, own in zip(
            jax.tree.leaves(scope.select(nothing, received.adapters)),
            jax.tree.leaves(scope.select(nothing, start)),
            strict=True,
        ):
            np.testing.assert_array_equal(found, own)


def bits_count_the_choice(subject: Subject) -> None:
    """Messages that choose differently say so: N different choices take log2(N) bits of index at least."""
    choices, least = set(), math.inf
    for seed in range(1, 17):
        message = _sent(subject.record, seed, 1.0, examples.scope())[3]
        choices.add(tuple(np.asarray(mask, bool).tobytes() for mask in jax.tree.leaves(message.sent)))
        least = min(least, int(message.index_bits.exact()))
    assert least >= math.log2(len(choices)), f"got {least} bits of index for {len(choices)} choices"


def the_offer_covers_the_message(subject: Subject) -> None:
    """No message is larger than what control has planned with."""
    method, scope = subject.record, examples.scope()
    for kept in range(1, examples.RANK + 1):
        start, trained, _, message, _ = _sent(method, 4, float(kept), scope)
        planned = int(payload.bits(method.offer(start, trained, scope).size, ()).exact()[kept])
        sent = int(payload.bits(payload.message_size(message), ()).exact())
        assert sent <= planned, f"got {sent} bits where {planned} were planned, at {kept} ranks"


def what_is_left_out_falls(subject: Subject) -> None:
    """The tail energy does not rise with the ranks kept, and is 0 where all are."""
    start, scope = examples.adapters(0), examples.scope()
    tail = np.asarray(subject.record.offer(start, examples.trained(5, start, scope), scope).tail_energy)
    assert tail.shape == (examples.MAX_RANK + 1,), f"got {tail.shape}"
    assert (np.diff(tail) <= 1e-5 * max(tail[0], 1e-9)).all() and abs(tail[examples.RANK]) <= 1e-5 * max(tail[0], 1e-9)


def memory_and_message_hold_all_of_an_update(subject: Subject) -> None:
    """What a client remembers is what it has held and not sent; of a memory in the form of adapters."""
    method, scope = subject.record, examples.scope()
    start, trained, memory, _, received = _sent(method, 6, 1.0, scope)
    if jax.tree.structure(memory) != jax.tree.structure(start):
        return
    for _ in range(2):  # from nothing, and from what is left of a round
        after = method.remember(trained, memory, received, scope)
        same_form(memory, after)
        held = jax.tree.map(jnp.add, trained, memory)
        total = jax.tree.map(jnp.add, received.adapters, after)
        nothing = jax.tree.map(jnp.zeros_like, start)
        close(scope.select(total, nothing), scope.select(held, nothing))
        memory = after
        message = method.encode(start, trained, memory, jnp.float32(1.0), scope, jax.random.key(7))
        received = method.decode(start, message, scope)


# ------------------------------------------------------------------------------------------------- aggregators


def _cohort(method: Aggregator, seeds: tuple[int, ...], start: Adapters) -> Adapters:
    """Clients `[C, ...]`, each trained in what the method has them send in its first round."""
    live = method.traffic(jnp.int32(0), True).sent
    scope = examples.scope(*(examples.RANK, *map(float, live)))
    return examples.stack([examples.trained(seed, start, scope) for seed in seeds])


def _aggregated(method: Aggregator, start: Adapters, clients: Adapters, weights: Any = examples.WEIGHTS) -> Any:
    from fedjax_lora.aggregation.products import as_changes

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


def _aggregator(method: Aggregator, context: Context) -> Any:
    start = examples.adapters(0)
    clients = _cohort(method, (1, 2, 3, 4), start)
    found = _aggregated(method, start, clients)
    one = jax.tree.map(lambda leaf: leaf[0], clients)
    rank = jnp.float32(examples.RANK)
    following = method.next_rank(start, one, rank) if method.next_rank else rank
    down = method.extra_downlink(start, context.cohort_size, rank).float32()
    return found, method.penalty(one, examples.scope().ranks), following, down


def equal_clients_average_to_themselves(subject: Subject) -> None:
    """Where all clients have trained the same, the server gains its product: weights sum to 1."""
    method, start = subject.record, examples.adapters(0)
    clients = _cohort(method, (1, 1, 1, 1), start)
    found = _products(method, start, _aggregated(method, start, clients))
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
    """`fold` equals `aggregate`, also where a client of weight 0 holds NaN."""
    method, start = subject.record, examples.adapters(0)
    if method.fold is None:
        return
    clients, weights = _cohort(method, (1, 2, 3, 4), start), (0.5, 0.3, 0.2, 0.0)
    expected = _aggregated(method, start, clients, weights).adapters
    received = examples.everything(jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), clients))
    sums = method.fold.init(start)
    for i, weight in enumerate(weights):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], received)
        sums = method.fold.add(sums, start, one, jnp.float32(weight))
    close(method.fold.finish(sums, start), expected)


# ------------------------------------------------------------------------------------------------- controllers


def _controller(method: Controller, context: Context) -> Any:
    state = method.init()
    decision = method.allocate(state, examples.observation())
    after, report = method.update(state, Outcome(jnp.float32(3.0), jnp.float32(0.2)))
    found = decision.kept, decision.share_hz, after, report
    return (*found, _priorities(method)) if method.schedule else found


def _priorities(method: Controller) -> Any:
    assert method.schedule is not None
    radio, clients = examples.observation().radio, examples.NUM_CLIENTS
    every = radio._replace(snr_hz=jnp.linspace(1e5, 1e6, clients), start_s=jnp.linspace(0.0, 1.0, clients))
    return method.schedule(method.init(), jax.random.key(0), jnp.arange(clients), every)


def shares_are_of_the_band(subject: Subject) -> None:
    """Shares are not negative, sum to the band at most, and an absent client has none."""
    seen = examples.observation()
    share = np.asarray(subject.record.allocate(subject.record.init(), seen).share_hz, np.float64)
    assert share.shape == seen.weights.shape, f"got {share.shape}"
    assert (share >= 0).all() and share.sum() <= float(seen.radio.band_hz) * (1 + 1e-5), f"got {share.tolist()}"
    assert (share[np.asarray(seen.weights) == 0] == 0).all(), f"got {share.tolist()}"


def kept_ranks_are_ranks(subject: Subject) -> None:
    """Each client keeps more than nothing and no more than its rank."""
    seen = examples.observation()
    kept = np.asarray(subject.record.allocate(subject.record.init(), seen).kept)
    assert kept.shape == seen.rank.shape and (kept > 0).all() and (kept <= np.asarray(seen.rank) + 1e-5).all(), kept


def no_order_of_the_cohort_is_special(subject: Subject) -> None:
    """Clients in another order get the same."""
    method, seen, order = subject.record, examples.observation(), [2, 0, 3, 1]
    first = method.allocate(method.init(), seen)
    radio = seen.radio._replace(
        snr_hz=seen.radio.snr_hz[jnp.array(order)], start_s=seen.radio.start_s[jnp.array(order)]
    )
    turned = rows(seen._replace(radio=None, whole_ranks=None), order)._replace(
        radio=radio, whole_ranks=seen.whole_ranks
    )
    other = method.allocate(method.init(), turned)
    close((other.kept, other.share_hz), rows((first.kept, first.share_hz), order), rtol=1e-3)


def queues_keep_their_form(subject: Subject) -> None:
    """The state after a round is like the one before."""
    method = subject.record
    state = jax.tree.map(jnp.asarray, method.init())
    same_form(state, method.update(state, Outcome(jnp.float32(3.0), jnp.float32(0.2)))[0])


def every_client_has_a_priority(subject: Subject) -> None:
    """`schedule` gives one number a client, and none is NaN."""
    if subject.record.schedule is None:
        return
    found = np.asarray(_priorities(subject.record))
    assert found.shape == examples.DIMENSIONS["K"] and not np.isnan(found).any(), f"got {found}"


# ------------------------------------------------------------------------------------------------- networks


def _wireless(method: Wireless, context: Context) -> Any:
    ids = jnp.arange(context.num_clients)
    state = method.init(jax.random.key(0), ids)
    state = method.step(state, jax.random.key(1), ids)
    clients, present = context.num_clients, ids < context.num_clients - 1
    work = examples.work(clients)
    radio = method.observe(state, work, jnp.full(clients, 1e5), present)
    share_hz = jnp.where(present, radio.band_hz / clients, 0.0)
    delivery = method.deliver(state, work, jnp.full(clients, 1e4), share_hz, radio.start_s, present)
    return state, radio, delivery.energy_j, delivery.delivered


def a_client_is_known_by_its_name(subject: Subject) -> None:
    """The channel of a client depends on its id: not on its place, nor on who else is there."""
    method, clients = subject.record, subject.context.num_clients
    ids, order = jnp.arange(clients), list(reversed(range(clients)))
    turned = ids[jnp.array(order)]
    state, other = (method.init(jax.random.key(0), which) for which in (ids, turned))
    close(rows(state, order), other)
    state, other = (method.step(s, jax.random.key(1), which) for s, which in ((state, ids), (other, turned)))
    close(rows(state, order), other)


def channels_keep_their_form(subject: Subject) -> None:
    """The state after a round is like the one before."""
    ids = jnp.arange(subject.context.num_clients)
    state = subject.record.init(jax.random.key(0), ids)
    same_form(state, subject.record.step(state, jax.random.key(1), ids))


def _network(subject: Subject, bits: float) -> Any:
    method, clients = subject.record, subject.context.num_clients
    ids, work = jnp.arange(clients), examples.work(clients)
    present = ids < clients - 1
    state = method.init(jax.random.key(0), ids)
    radio = method.observe(state, work, jnp.zeros(clients), present)
    share_hz = jnp.where(present, radio.band_hz / clients, 0.0)
    return radio, method.deliver(state, work, jnp.full(clients, bits), share_hz, radio.start_s, present)


def who_is_absent_costs_nothing(subject: Subject) -> None:
    """An absent client takes no time and no energy, and nothing of it is delivered."""
    radio, found = _network(subject, 1e4)
    last = float(found.latency_s[-1]), float(found.energy_j[-1]), bool(found.delivered[-1]), float(radio.start_s[-1])
    assert last == (0.0, 0.0, False, 0.0), f"got {last}"


def more_bits_take_no_less_time(subject: Subject) -> None:
    """Latency and energy do not fall with the bits, and without bits an upload ends where it starts."""
    (radio, none), (_, some), (_, more) = (_network(subject, bits) for bits in (0.0, 1e4, 1e5))
    close(none.latency_s, radio.start_s)
    for less, next_ in ((none, some), (some, more)):
        assert bool(jnp.all(next_.latency_s >= less.latency_s * (1 - 1e-6))), "latency falls"
        assert bool(jnp.all(next_.energy_j >= less.energy_j * (1 - 1e-6))), "energy falls"


# ------------------------------------------------------------------------------------------------- server optimizers


def _server(method: Any, context: Context) -> Any:
    params = examples.adapters(0)
    first, state = method.update(examples.adapters(1), method.init(params), params)
    return first, method.update(examples.adapters(2), state, params)


def a_server_that_is_told_nothing_stays(subject: Subject) -> None:
    """A pseudo-gradient of zero, from rest, moves nothing."""
    method, params = subject.record, examples.adapters(0)
    state, nothing = method.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        updates, after = method.update(nothing, state, params)
        same_form(state, after)
        jax.tree.map(np.testing.assert_array_equal, updates, nothing)
        state = after


EXERCISES: dict[str, Exercise] = {
    "sparsifier": _sparsifier,
    "aggregation": _aggregator,
    "control": _controller,
    "wireless": _wireless,
    "server": _server,
}
"""Slot -> what the functions of its record give on the examples."""

LAWS: dict[str, dict[str, Law]] = {
    "sparsifier": named(
        what_is_kept_whole_arrives_whole,
        what_is_out_of_scope_stays,
        bits_count_the_choice,
        the_offer_covers_the_message,
        what_is_left_out_falls,
        memory_and_message_hold_all_of_an_update,
    ),
    "aggregation": named(
        equal_clients_average_to_themselves,
        who_is_absent_changes_nothing,
        no_order_of_the_clients_is_special,
        without_clients_nothing_moves,
        weights_of_the_mean_product_sum_to_one,
        one_client_after_the_other_gives_the_same,
    ),
    "control": named(
        shares_are_of_the_band,
        kept_ranks_are_ranks,
        no_order_of_the_cohort_is_special,
        queues_keep_their_form,
        every_client_has_a_priority,
    ),
    "wireless": named(
        a_client_is_known_by_its_name,
        channels_keep_their_form,
        who_is_absent_costs_nothing,
        more_bits_take_no_less_time,
    ),
    "server": named(a_server_that_is_told_nothing_stays),
}
"""Slot -> its laws by name."""
