"""Records of the network and of who decides about it: the wireless environment and the controllers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Work


class Radio(NamedTuple):
    """What control knows of the network in a round.

    snr_hz: `[C]` received power over noise density, p * g / N0, Hz; 0 for who cannot be heard.
    start_s: `[C]` seconds at which a client can begin its upload (downlink and compute); 0 for who is absent.
    band_hz: scalar, the band to share.
    power_w: scalar, that all clients send with.
    shared_s: `[C]` seconds by which a client begins later for each that takes part, itself among them: its share of the
      server's processor and of the downlink. `start_s` of a cohort counts it already. None where nothing is shared.
    compute_j: `[C]` J that computing takes a client in the round; None where the network does not say.
    server_j: `[C]` J that the server spends on computing for it; None where it computes nothing.
    """

    snr_hz: Array
    start_s: Array
    band_hz: Array
    power_w: Array
    shared_s: Array | None = None
    compute_j: Array | None = None
    server_j: Array | None = None


class Population(NamedTuple):
    """What a controller sees of all clients before any of them trains.

    ids: `[K]` int32.
    radio: `[K]`, without a broadcast, and without what is shared in its starts.
    weights: `[K]` in the average if all took part; they sum to 1.
    rank: `[K]` structural ranks.
    bits: `[K, R + 1]` float32 that each would send in the round, were 0 ... R ranks of its update kept.
    whole_ranks: see `Observation`.
    """

    ids: Array
    radio: Radio
    weights: Array
    rank: Array
    bits: Array
    whole_ranks: bool = True


class Delivery(NamedTuple):
    """How the uploads of one cohort went.

    latency_s: `[C]` seconds at which each client's last attempt ended, downlink and compute included; 0 for an absent
      client, inf where the payload could not be sent at all.
    energy_j: `[C]` compute and transmit energy.
    delivered: `[C]` bool: False for an outage, an infeasible link or an absent client.
    """

    latency_s: Array
    energy_j: Array
    delivered: Array


class Wireless(NamedTuple):
    """The network between clients and server: an environment that can be used alone, as `sim.network` does.

    init: `(key, client_ids [K]) -> state [K, ...]`.
    step: `(state, key, client_ids [K]) -> state`: the next round's channels.
    observe: `(state of the cohort, Work [C], downlink_bits [C] float32, present [C]) -> Radio`, with `shared_s` where
      the work has `server_samples` and `down_bits`.
    deliver: `(state of the cohort, Work [C], bits [C] float32, share_hz [C], start_s [C], present [C]) -> Delivery`.
    forgets: scalar bool, whether a client's channels of a round do not depend on those of the last one: then only those
      of a cohort are drawn.
    """

    init: Callable[[Array, Array], Any]
    step: Callable[[Any, Array, Array], Any]
    observe: Callable[[Any, Work, Array, Array], Radio]
    deliver: Callable[[Any, Work, Array, Array, Array, Array], Delivery]
    forgets: Array | bool = False


class Observation(NamedTuple):
    """What a controller sees of one round's cohort after local training.

    radio: of the network. weights: `[C]` aggregation weights; 0 marks an absent client.
    rank: `[C]` structural ranks.
    tail_energy, bits: `[C, R + 1]` float32, of `Offer`, where a client keeps 0 ... R ranks.
    whole_ranks: whether only whole ranks are sent, see `Sparsifier`.
    """

    radio: Radio
    weights: Array
    rank: Array
    tail_energy: Array
    bits: Array
    whole_ranks: bool = True


class Decision(NamedTuple):
    """What a controller decides.

    kept: `[C]` ranks to keep a module, float32, in (0, rank].
    share_hz: `[C]` of the band, sums to no more than it; 0 for an absent client.
    latency_s: scalar, when the last of those who can send ends, as planned; NaN where the controller plans none.
    objective: scalar, what the controller minimises; NaN where it minimises nothing.
    """

    kept: Array
    share_hz: Array
    latency_s: Array | float = float("nan")
    objective: Array | float = float("nan")


class Outcome(NamedTuple):
    """What a round came to, for the controller: its latency, s, and the mean energy of the cohort's clients, J."""

    latency_s: Array
    energy_j: Array


def _in_full(staleness: Array) -> Array:
    return jnp.ones_like(staleness)


class Arrival(NamedTuple):
    """When the server steps, and what an update counts that comes late.

    takes: updates that a step waits for, M, the first of the C clients that run at once, each of which begins anew when
      it has ended; None for rounds, whose clients begin together and are all waited for. Static.
    discount: `staleness [...] -> [...]`, in (0, 1] and 1 at 0: what the change of a client counts that began so many
      steps before the one that takes it.
    """

    takes: int | None = None
    discount: Callable[[Array], Array] = _in_full


def _no_queue(state: Any, outcome: Outcome) -> tuple[Any, dict[str, Array]]:
    return state, {}


class Controller(NamedTuple):
    """Who takes part, and how much each sends on which part of the band; it owns its queues.

    allocate: `(state, Observation) -> Decision`, after local training.
    init: `() -> state`, a tree of arrays, before round 1.
    update: `(state, Outcome) -> (state, report)` after the round. The report names scalars: `queue_s` and
      `energy_queue_j` are metrics of their own, any other appears as `control/name`.
    schedule: `(state, key, Population) -> (priority [K], state)`, before local training: the clients of the highest
      priorities are the cohort, and none of priority -inf; None for a uniform sample.
    over_the_air: whether uploads and downloads take time and energy; without, there is no network.
    """

    allocate: Callable[[Any, Observation], Decision]
    init: Callable[[], Any] = lambda: ()
    update: Callable[[Any, Outcome], tuple[Any, dict[str, Array]]] = _no_queue
    schedule: Callable[[Any, Array, Population], tuple[Array, Any]] | None = None
    over_the_air: bool = True
