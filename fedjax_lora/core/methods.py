"""The strategies a round is made of, as records of pure functions, and the small outputs that pass between them.

A method is a factory that returns one of these records: structure in its closure, numbers as arguments. Dimension
letters are those of `base`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.types import Adapters, Base, Batch, Factors, Hyper, LinkState, Scope


class Hidden(NamedTuple):
    """What passes between a model's parts.

    values: `[B, S, d]`.
    mask: `[B, S]` 1 for a real position and 0 for padding, float32.
    """

    values: Array
    mask: Array


class Model(NamedTuple):
    """A model as pure functions of its frozen weights; `apply` composes three parts that can be cut apart.

    The factors that these functions receive are effective ones: rank mask and alpha / r are already folded in
    (see `lora.effective`), so a module adds `(x @ a) @ b` and no more. `key` drives dropout; None turns it off.

    init: `key -> base`: random frozen weights.
    init_head: `key -> head`: a fresh task head.
    embed: `(base, batch, key) -> Hidden`.
    layers: `(base, adapters, hidden, key) -> Hidden`.
    task: `(base, adapters, hidden, key) -> [B, classes]` logits.
    targets: module name -> `(n_in, n_out)`: where an adapter may sit.
    num_layers: L.
    """

    init: Callable[[Array], Base]
    init_head: Callable[[Array], dict[str, Array]]
    embed: Callable[[Base, Batch, Array | None], Hidden]
    layers: Callable[[Base, Adapters, Hidden, Array | None], Hidden]
    task: Callable[[Base, Adapters, Hidden, Array | None], Array]
    targets: Mapping[str, tuple[int, int]]
    num_layers: int

    def apply(self, base: Base, adapters: Adapters, batch: Batch, key: Array | None = None) -> Array:
        """`[B, classes]` logits."""
        hidden = self.embed(base, batch, key)
        hidden = self.layers(base, adapters, hidden, key)
        return self.task(base, adapters, hidden, key)


@struct.dataclass
class Sent:
    """One client's transmission, as the server decodes it.

    adapters: the server's copy of the client's adapters: what was left out is already filled in.
    counted: module name -> `[L, R]`: 1 where the component enters the average, 0 where the client has no say.
    bits: uint32 scalar, uplink bits with index and head.
    kept_ranks: float32 scalar, mean number of components kept a module.
    dropped_energy: float32 scalar, exact energy of what was left out, `||sum of dropped a_i b_i||_F^2` summed
      over modules, without the scale s.
    """

    adapters: Adapters
    counted: dict[str, Array]
    bits: Array
    kept_ranks: Array
    dropped_energy: Array


class Sparsifier(NamedTuple):
    """What one client sends, and what it remembers. Written for one client; the round maps it over the cohort.

    broadcast: `(adapters, scope, ranks [R]) -> (adapters, bits)`: what the clients start from, of all that is in scope
      at the structural rank, and the uint32 downlink bits for a client of these ranks.
    tail_energy: `(start, trained, scope) -> [R + 1]`: energy left out when k components a module are kept,
      k = 0 ... R; non-increasing, 0 at the structural rank.
    payload_bits: `(keep_ratio [...], scope) -> [...]` float32 uplink bits at that ratio, head included: what
      control plans with.
    compress: `(start, trained, memory, keep_ratio, scope, key) -> (Sent, memory)`; `start` is the broadcast, and
      `trained` is equal to it outside of the scope.
    init: `adapters -> memory`: what a client carries from one of its rounds to the next; `()` for nothing.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to the local loss, times `Hyper.orthogonality`.
    """

    broadcast: Callable[[Adapters, Scope, Array], tuple[Adapters, Array]]
    tail_energy: Callable[[Adapters, Adapters, Scope], Array]
    payload_bits: Callable[[Array, Scope], Array]
    compress: Callable[[Adapters, Adapters, Any, Array, Scope, Array], tuple[Sent, Any]]
    init: Callable[[Adapters], Any] = lambda adapters: ()
    penalty: Callable[[Adapters, Array], Array] = lambda adapters, rank_mask: jnp.zeros(())


class Aggregate(NamedTuple):
    """What the server makes of a round.

    adapters: the new global adapters, before the server optimizer.
    merged: module name -> `[L, n_in, n_out]`, what is added to the frozen weights from now on; `{}` where the
      method never does.
    sparsification_error: `||s * E_s||_F` over all modules.
    covariance_error: `||s * (sum_k p_k a_k b_k - server's product)||_F` over all modules, of what was received and
      with what was merged in the server's product; `||s * Cov||_F` where the factors are averaged apart.
    """

    adapters: Adapters
    merged: dict[str, Array]
    sparsification_error: Array
    covariance_error: Array


class Live(NamedTuple):
    """Which parts of the adapters take part, as in `Scope`."""

    a: Array | float = 1.0
    b: Array | float = 1.0
    head: Array | float = 1.0


Enter = Callable[[Factors, Factors, Array, Array], tuple[Factors, Array]]
"""What of one layer enters the average, and how much it weighs.

`(broadcast, received [C, ...], counted [C, R], p [C]) -> (factors [C, ...], w [C, R])`; the weights of each component
sum to 1 over the clients, or are 0 where p is.
"""


class Aggregator(NamedTuple):
    """How the server averages, and what the clients train for it.

    aggregate: `(broadcast, trained [C, ...], sent [C, ...], weights [C], scale, key) -> Aggregate`. `weights` are
      non-negative, sum to 1, and are 0 for a client that is absent; all-zero weights leave the broadcast as it
      is. `trained` is what the clients hold of what they send (for the error norms); `scale` is s = alpha / r.
      In `trained` and `sent`, b is zero in the components that are not a client's own.
    enter: with whose say the mean of what has arrived is `sum_ki w_ki a_ki b_ki`: `sparsification_error` is the
      distance of the ideal mean from it, and `covariance_error` its distance from the server's product.
    trains: `round -> Live` that the clients train; what they hold beyond it is the broadcast.
    keeps: the parts ("a", "b", "head") that stay with each client from round to round, and are never sent.
    merges: whether `Aggregate.merged` is used.
    resumes: whether clients go on from the factors that they ended their last round with, and count by their change:
      they compute with `a b - a0 b0`, and `aggregate` is given it, in the factors of `ops.products.differences`.
    moved: `(round, everyone) -> Live`: what of the adapters a client cannot know before the broadcast of the round,
      where `everyone` says that all clients are sent every broadcast; None for what they train.
    extra_downlink_bits: `(adapters or their shapes, C, rank) -> uint32 bits` of each broadcast but the first, beside
      the adapters; for C it is told None where clients sit out rounds, and may have missed any number of them.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to a client's local loss.
    next_rank: `(broadcast, trained of one client, its rank) -> rank` of its next round; None where ranks stay.
    """

    aggregate: Callable[[Adapters, Adapters, Sent, Array, Array, Array], Aggregate]
    enter: Enter
    trains: Callable[[Array], Live] = lambda round_number: Live()
    keeps: tuple[str, ...] = ()
    merges: bool = False
    resumes: bool = False
    moved: Callable[[Array, bool], Live] | None = None
    extra_downlink_bits: Callable[[Adapters, int | None, ArrayLike], Array] = lambda like, clients, rank: jnp.uint32(0)
    penalty: Callable[[Adapters, Array], Array] = lambda adapters, rank_mask: jnp.zeros(())
    next_rank: Callable[[Adapters, Adapters, Array], Array] | None = None

    def sends(self, round_number: Array) -> Live:
        """What the clients send: all that they train and do not keep."""
        return self.trains(round_number)._replace(**dict.fromkeys(self.keeps, 0.0))

    def receives(self, round_number: Array, everyone: bool) -> Live:
        """What the clients are sent: what has moved, see `moved`, and is shared."""
        live = self.moved(round_number, everyone) if self.moved else self.trains(round_number)
        return live._replace(**dict.fromkeys(self.keeps, 0.0))


class Drift(NamedTuple):
    """A correction of the clients' gradients against their drift apart.

    init_client, init_server: `adapters -> state`, one client's and the server's; `()` for none.
    gradient: `(gradient, adapters, start, server, client) -> gradient` at each local step.
    next_client: `(start, trained, path, scope, server, client) -> client` after local training of what is in scope,
      where `path` is the sum of the learning rates of its steps.
    next_server: `(server, mean over the K clients of the change of their state) -> server`.
    """

    init_client: Callable[[Adapters], Any]
    init_server: Callable[[Adapters], Any]
    gradient: Callable[[Adapters, Adapters, Adapters, Any, Any], Adapters]
    next_client: Callable[[Adapters, Adapters, Array, Scope, Any, Any], Any]
    next_server: Callable[[Any, Any], Any]


class Observation(NamedTuple):
    """What a controller sees of one round's cohort.

    snr_hz: `[C]` received power over noise density, p * g / N0, Hz.
    start_s: `[C]` seconds at which a client can begin its upload (downlink and compute).
    weights: `[C]` aggregation weights; 0 marks an absent client.
    tail_energy: `[C, R + 1]` of `Sparsifier.tail_energy`.
    rank: `[C]` structural ranks.
    payload_bits: `[C] keep ratios -> [C]` bits.
    bandwidth_hz: scalar, the band to share.
    queue_s: scalar, virtual queue of the latency constraint.
    hyper: the traced numbers.
    energy_queue_j: scalar, virtual queue of the energy constraint.
    power_w: that all clients send with.
    """

    snr_hz: Array
    start_s: Array
    weights: Array
    tail_energy: Array
    rank: Array
    payload_bits: Callable[[Array], Array]
    bandwidth_hz: Array
    queue_s: Array
    hyper: Hyper
    energy_queue_j: Array | float = 0.0
    power_w: float = 0.0


class Decision(NamedTuple):
    """What a controller decides.

    keep_ratio: `[C]` in (0, 1].
    bandwidth_hz: `[C]`, sums to no more than the band; 0 for an absent client.
    latency_s: scalar, when the last of those who can send ends, as planned; NaN where the controller plans none.
    objective: scalar, what the controller minimises; NaN where it minimises nothing.
    """

    keep_ratio: Array
    bandwidth_hz: Array
    latency_s: Array | float = float("nan")
    objective: Array | float = float("nan")


class Controller(NamedTuple):
    """How ratio and bandwidth are chosen each round.

    decide: `Observation -> Decision`.
    update_queue: `(queue_s, latency_s) -> queue_s` after the round.
    queue_s: before round 1.
    update_energy_queue: `(energy_queue_j, mean energy of the cohort's clients) -> energy_queue_j` after the round.
    """

    decide: Callable[[Observation], Decision]
    update_queue: Callable[[Array, Array], Array]
    queue_s: float = 0.0
    update_energy_queue: Callable[[Array, Array], Array] = lambda energy_queue_j, energy_j: energy_queue_j


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


class Link(NamedTuple):
    """The network between clients and server.

    init: `(key, client_ids [K]) -> LinkState`.
    step: `(state, key, client_ids [K]) -> LinkState`: the next round's fading.
    snr_hz: `(state of the cohort) -> [C]` as control knows it.
    start_s: `(state of the cohort, samples [C], downlink_bits, present [C]) -> [C]`: downlink broadcast plus compute,
      where `samples` are the examples that each client computes before it sends.
    deliver: `(state of the cohort, samples [C], bits [C], decision, start_s [C], present [C]) -> Delivery`.
    bandwidth_hz: the uplink band. power_w: of a client's transmitter.
    """

    init: Callable[[Array, Array], LinkState]
    step: Callable[[LinkState, Array, Array], LinkState]
    snr_hz: Callable[[LinkState], Array]
    start_s: Callable[[LinkState, Array, Array, Array], Array]
    deliver: Callable[[LinkState, Array, Array, Decision, Array, Array], Delivery]
    bandwidth_hz: float
    power_w: float
