"""The laws of controllers and of networks: who sends what on which band, and how that goes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.methods import Context
from fedjax_lora.core.network import Arrival, Controller, Outcome, Population, Wireless
from fedjax_lora.testing import examples
from fedjax_lora.testing.laws import Subject, close, named, rows, same_form


def exercise_control(method: Controller, context: Context) -> Any:
    """A decision, and the queues after a round."""
    state = method.init()
    decision = method.allocate(state, examples.observation())
    after, report = method.update(state, Outcome(jnp.float32(3.0), jnp.float32(0.2)))
    found = decision.kept, decision.share_hz, after, report
    if method.schedule is None:
        return found
    priority, scheduled = _priorities(method)
    return *found, jnp.maximum(priority, -1e30), scheduled  # -inf, of who shall not take part, has no difference


def _priorities(method: Controller) -> Any:
    assert method.schedule is not None
    radio, clients = examples.observation().radio, examples.NUM_CLIENTS
    every = radio._replace(snr_hz=jnp.linspace(1e5, 1e6, clients), start_s=jnp.linspace(0.0, 1.0, clients))
    weights = jnp.full(clients, 1 / clients)
    seen = examples.observation()
    bits = jnp.linspace(1.0, 2.0, clients)[:, None] * seen.bits[0]
    population = Population(jnp.arange(clients), every, weights, jnp.full(clients, seen.rank[0]), bits)
    return method.schedule(method.init(), jax.random.key(0), population)


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
    """`schedule` gives one number a client, none of them NaN, and a state like the one before."""
    if subject.record.schedule is None:
        return
    priority, state = _priorities(subject.record)
    found = np.asarray(priority)
    assert found.shape == examples.DIMENSIONS["K"] and not np.isnan(found).any(), f"got {found}"
    same_form(jax.tree.map(jnp.asarray, subject.record.init()), state)


CONTROL = named(
    shares_are_of_the_band,
    kept_ranks_are_ranks,
    no_order_of_the_cohort_is_special,
    queues_keep_their_form,
    every_client_has_a_priority,
)


# ------------------------------------------------------------------------------------------------- networks


def exercise_wireless(method: Wireless, context: Context) -> Any:
    """A round in which all clients but one send."""
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


WIRELESS = named(
    a_client_is_known_by_its_name,
    channels_keep_their_form,
    who_is_absent_costs_nothing,
    more_bits_take_no_less_time,
)

# -------------------------------------------------------------------------------------------------------- arrivals


def exercise_arrival(method: Arrival, context: Context) -> Any:
    """What changes count, from those that are on time to late ones."""
    del context
    return method.discount(jnp.arange(5.0))


def who_is_on_time_counts_in_full(subject: Subject) -> None:
    """A discount is 1 of a client that began after the last step, in (0, 1] later, and never rises."""
    found = np.asarray(subject.record.discount(jnp.arange(5.0)))
    assert found.shape == (5,) and found[0] == 1 and (found > 0).all() and (np.diff(found) <= 0).all(), found.tolist()


def a_step_takes_clients_that_run(subject: Subject) -> None:
    """It takes one at least, and no more than run at once; or it is a round."""
    takes, most = subject.record.takes, subject.context.cohort_size
    assert takes is None or 1 <= takes <= most, f"got {takes}"


ARRIVAL = named(who_is_on_time_counts_in_full, a_step_takes_clients_that_run)
