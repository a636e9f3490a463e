"""The shapes everything else is written against: adapters, state, metrics and the strategy records.

Glossary of dimensions, used in every docstring:

| letter | meaning |
|---|---|
| `K` | clients in all |
| `C` | clients of one round's cohort |
| `N` | examples in a pool |
| `B`, `S`, `d` | batch, sequence (tokens or patches), model width |
| `L` | layers |
| `R` | maximum LoRA rank; the structural rank `r <= R` and the kept ranks are masks over it |
| `n_in`, `n_out` | a module's input and output width |

Three kinds of thing have three containers: configs are frozen dataclasses (static, checked when made); params
and state are `flax.struct` dataclasses (traced); records of functions and small outputs are named tuples.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

Base = Any
"""Frozen weights of a model: a pytree whose `layers` leaves are stacked to `[L, ...]`."""

Batch = Mapping[str, Array]
"""Model inputs with a leading axis `B`, and `label: [B]` int32."""


@struct.dataclass
class Factors:
    """LoRA factors of one module over all layers.

    The module computes `x @ w + s * (x @ a) @ b`. Rank component i is the pair `(a[..., :, i], b[..., i, :])`.

    a: `[L, n_in, R]`.
    b: `[L, R, n_out]`.
    """

    a: Array
    b: Array


@struct.dataclass
class Adapters:
    """Everything a client trains: low-rank factors by module name, and the task head in full.

    modules: module name -> Factors.
    head: leaf name -> array of any shape; trained, sent and averaged whole.
    """

    modules: dict[str, Factors]
    head: dict[str, Array]


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
class Hyper:
    """Numbers that a sweep may vary: traced scalars, so that one program serves every value.

    rank: structural rank r, 1 <= r <= R, float32.
    alpha: LoRA's alpha; products are scaled by alpha / r.
    learning_rate: peak rate of the clients' optimizer.
    orthogonality: weight of the regulariser of SOFT.
    keep_ratio: share of the ranks to keep, for the controllers that do not choose it themselves.
    """

    rank: Array
    alpha: Array
    learning_rate: Array
    orthogonality: Array
    keep_ratio: Array


@struct.dataclass
class Scope:
    """What of its adapters a client trains, or sends, in one round: masks, so that one program serves every choice.

    ranks: `[R]`, 1 for the rank components in use, 0 for the others.
    a, b, head: float32 scalars, 1 where the factor or the head takes part, else 0.
    """

    ranks: Array
    a: Array
    b: Array
    head: Array

    @classmethod
    def whole(cls, ranks: Array) -> "Scope":
        """Both factors, in these ranks, and the head."""
        return cls(ranks=jnp.asarray(ranks), a=jnp.ones(()), b=jnp.ones(()), head=jnp.ones(()))

    def select(self, inside: Adapters, outside: Adapters) -> Adapters:
        """`inside` where it is in scope, `outside` elsewhere."""
        in_a, in_b = self.ranks * self.a > 0, (self.ranks * self.b > 0)[:, None]
        modules = {
            name: Factors(
                a=jnp.where(in_a, inside.modules[name].a, old.a), b=jnp.where(in_b, inside.modules[name].b, old.b)
            )
            for name, old in outside.modules.items()
        }
        head = jax.tree.map(lambda new, old: jnp.where(self.head > 0, new, old), inside.head, outside.head)
        return Adapters(modules=modules, head=head)


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

    broadcast: `(adapters, scope) -> (adapters, bits)`: what the clients start from, and its uint32 downlink bits.
    tail_energy: `(start, trained, scope) -> [R + 1]`: energy left out when k components a module are kept,
      k = 0 ... R; non-increasing, 0 at the structural rank.
    payload_bits: `(keep_ratio [...], scope) -> [...]` float32 uplink bits at that ratio, head included: what
      control plans with.
    compress: `(start, trained, memory, keep_ratio, scope, key) -> (Sent, memory)`; `start` is the broadcast, and
      `trained` is equal to it outside of the scope.
    init: `adapters -> memory`: what a client carries from one of its rounds to the next; `()` for nothing.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to the local loss, times `Hyper.orthogonality`.
    """

    broadcast: Callable[[Adapters, Scope], tuple[Adapters, Array]]
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


class Aggregator(NamedTuple):
    """How the server averages, and what the clients train for it.

    aggregate: `(broadcast, trained [C, ...], sent [C, ...], weights [C], scale, key) -> Aggregate`. `weights` are
      non-negative, sum to 1, and are 0 for a client that is absent; all-zero weights leave the broadcast as it
      is. `trained` is what the clients hold of what they send (for the error norms); `scale` is s = alpha / r.
      In `trained` and `sent`, b is zero in the components that are not a client's own.
    trains: `round -> Live` that the clients train; what they hold beyond it is the broadcast.
    keeps: the parts ("a", "b", "head") that stay with each client from round to round, and are never sent.
    merges: whether `Aggregate.merged` is used.
    extra_downlink_bits: `(adapters or their shapes, C) -> bits` of each broadcast beside the adapters.
    next_rank: `(trained of one client, its rank) -> rank` of its next round; None where ranks stay.
    """

    aggregate: Callable[[Adapters, Adapters, Sent, Array, Array, Array], Aggregate]
    trains: Callable[[Array], Live] = lambda round_number: Live()
    keeps: tuple[str, ...] = ()
    merges: bool = False
    extra_downlink_bits: Callable[[Adapters, int], int] = lambda like, cohort_size: 0
    next_rank: Callable[[Adapters, Array], Array] | None = None

    def sends(self, round_number: Array) -> Live:
        """What the clients send: all that they train and do not keep."""
        return self.trains(round_number)._replace(**dict.fromkeys(self.keeps, 0.0))


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
    """

    decide: Callable[[Observation], Decision]
    update_queue: Callable[[Array, Array], Array]


@struct.dataclass
class LinkState:
    """The radio world of all clients; leaves are `[K]`.

    mean_gain: linear power gain of path loss and shadowing.
    fading: complex64 small-scale coefficient h, E|h|^2 = 1 (a constant 1 without fading).
    cpu_hz: processor frequency.
    """

    mean_gain: Array
    fading: Array
    cpu_hz: Array


class Delivery(NamedTuple):
    """How the uploads of one cohort went.

    latency_s: `[C]` seconds at which each client's upload ended, downlink and compute included; 0 for an absent
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
    start_s: `(state of the cohort, downlink_bits, present [C]) -> [C]`: downlink broadcast plus compute.
    deliver: `(state of the cohort, bits [C], decision, start_s [C], present [C]) -> Delivery`.
    bandwidth_hz: the uplink band.
    """

    init: Callable[[Array, Array], LinkState]
    step: Callable[[LinkState, Array, Array], LinkState]
    snr_hz: Callable[[LinkState], Array]
    start_s: Callable[[LinkState, Array, Array], Array]
    deliver: Callable[[LinkState, Array, Decision, Array, Array], Delivery]
    bandwidth_hz: float


@struct.dataclass
class Dataset:
    """A federated data set on the device.

    train: pool of examples, leaves `[N, ...]`, shared by all clients through `index`.
    index: `[K, n_max]` int32 rows of `train`; row k holds `count[k]` valid entries, then padding (any valid row).
    count: `[K]` int32 examples of each client.
    test: pool of held-out examples, leaves `[N_test, ...]`.
    """

    train: dict[str, Array]
    index: Array
    count: Array
    test: dict[str, Array]


@struct.dataclass
class ClientState:
    """What every client carries from one of its rounds to the next; leaves are `[K, ...]`.

    rank: its structural rank, float32.
    kept: the parts of the adapters that stay with it: part ("a", "b", "head") -> leaves; `{}` for none.
    memory: of the sparsifier. drift: of the correction.
    """

    rank: Array
    kept: dict[str, Any]
    memory: Any
    drift: Any


@struct.dataclass
class FedState:
    """All that a run carries from one round to the next.

    key: the run's key; a round's keys are `fold_in(key, round)`.
    round: int32 scalar, rounds done.
    adapters: global adapters.
    server: state of the server optimizer.
    link: LinkState of all K clients.
    queue_s: virtual queue of the latency constraint.
    elapsed_s: simulated seconds so far.
    merged: module name -> `[L, n_in, n_out]` added to the frozen weights; `{}` for none.
    drift: the server's state of the drift correction.
    clients: what each client carries.
    hyper: traced numbers, constant over a run.
    """

    key: Array
    round: Array
    adapters: Adapters
    server: Any
    link: LinkState
    queue_s: Array
    elapsed_s: Array
    merged: dict[str, Array]
    drift: Any
    clients: ClientState
    hyper: Hyper


@struct.dataclass
class Metrics:
    """What is observed of a round; stacked to `[rounds, ...]` by a run. NaN stands for "not measured".

    round: int32, counted from 1.
    train_loss: mean over the participants of their mean local cross-entropy.
    eval_loss, eval_accuracy: of the global adapters on the held-out pool, after the round.
    personal_accuracy: of the clients' own adapters where they keep some, see `sim.evaluate.make_evaluate_personal`.
    latency_s: seconds until the last upload ended; a client that can never be heard is not waited for.
    elapsed_s: the sum of latency_s so far.
    client_uplink_bits, client_downlink_bits: `[C]` uint32, 0 for who did not send or receive; an upload that
      was lost to fading counts.
    energy_j: of the whole cohort.
    queue_s: virtual queue after the round.
    keep_ratio_mean, kept_ranks_mean: what control planned and what was sent, over the participants.
    participants: clients whose update entered the average.
    outages: scheduled clients whose upload did not arrive.
    nonfinite_clients: clients left out because their update was not finite.
    sparsification_error, covariance_error: norms of the two terms that separate the server's product from the
      ideal average of products.
    dropped_energy: mean over the participants.
    orthogonality: largest |cosine| between two rank components of a module, mean over the participants.
    """

    round: Array
    train_loss: Array
    eval_loss: Array
    eval_accuracy: Array
    personal_accuracy: Array
    latency_s: Array
    elapsed_s: Array
    client_uplink_bits: Array
    client_downlink_bits: Array
    energy_j: Array
    queue_s: Array
    keep_ratio_mean: Array
    kept_ranks_mean: Array
    participants: Array
    outages: Array
    nonfinite_clients: Array
    sparsification_error: Array
    covariance_error: Array
    dropped_energy: Array
    orthogonality: Array

    @property
    def uplink_bits(self) -> np.ndarray:
        """`[...]` int64 uplink bits of the cohort: summed on the host, since float32 would round them."""
        return np.asarray(self.client_uplink_bits).astype(np.int64).sum(-1)

    @property
    def downlink_bits(self) -> np.ndarray:
        """`[...]` int64 downlink bits, summed over the receivers."""
        return np.asarray(self.client_downlink_bits).astype(np.int64).sum(-1)
