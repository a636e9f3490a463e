"""The shapes everything else is written against: adapters, state and metrics.

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

from collections.abc import Mapping
from typing import Any

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
class LinkState:
    """The radio world of all clients; leaves are `[K]`.

    mean_gain: linear power gain of path loss and shadowing.
    fading: complex64 small-scale coefficient h, E|h|^2 = 1 (a constant 1 without fading).
    cpu_hz: processor frequency.
    estimate: complex64, the coefficient as it was estimated; None where the link estimates none.
    retries: `[K, M]` power gains |h|^2 that M further attempts of the round would meet; None where there are none.
    """

    mean_gain: Array
    fading: Array
    cpu_hz: Array
    estimate: Array | None = None
    retries: Array | None = None


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
    own: module name -> Factors that it goes on from; `{}` where it starts from the broadcast.
    """

    rank: Array
    kept: dict[str, Any]
    memory: Any
    drift: Any
    own: dict[str, Factors] = struct.field(default_factory=dict)


@struct.dataclass
class FedState:
    """All that a run carries from one round to the next.

    key: the run's key; a round's keys are `fold_in(key, round)`.
    round: int32 scalar, rounds done.
    adapters: global adapters.
    server: state of the server optimizer.
    link: LinkState of all K clients.
    queue_s: virtual queue of the latency constraint. energy_queue_j: of the energy constraint.
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
    energy_queue_j: Array
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
    eval_loss, eval_accuracy: of the global adapters on the held-out pool, after the round. Where clients keep parts,
      these are the mean over all clients: what one would give to a newcomer, see `sim.kept.deployed`.
    personal_accuracy: of the clients' own adapters where they keep some, see `sim.evaluate.make_evaluate_personal`.
    latency_s: seconds until the last upload ended; a client that can never be heard is not waited for.
    elapsed_s: the sum of latency_s so far.
    client_uplink_bits, client_downlink_bits: `[C]` uint32, 0 for who did not send or receive; an upload that
      was lost to fading counts.
    energy_j: of the whole cohort.
    queue_s, energy_queue_j: virtual queues after the round.
    keep_ratio_mean, kept_ranks_mean: what control planned and what was sent, over the participants.
    participants: clients whose update entered the average.
    outages: scheduled clients whose upload did not arrive.
    nonfinite_clients: clients left out because their update was not finite.
    sparsification_error, covariance_error: norms of the two terms that separate the server's product from the
      ideal average of products.
    dropped_energy: mean over the participants.
    tail_energy: `[R + 1]`, the importance profile: see `strategies.Sparsifier`, mean over the participants.
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
    energy_queue_j: Array
    keep_ratio_mean: Array
    kept_ranks_mean: Array
    participants: Array
    outages: Array
    nonfinite_clients: Array
    sparsification_error: Array
    covariance_error: Array
    dropped_energy: Array
    tail_energy: Array
    orthogonality: Array

    @property
    def uplink_bits(self) -> np.ndarray:
        """`[...]` int64 uplink bits of the cohort: summed on the host, since float32 would round them."""
        return np.asarray(self.client_uplink_bits).astype(np.int64).sum(-1)

    @property
    def downlink_bits(self) -> np.ndarray:
        """`[...]` int64 downlink bits, summed over the receivers."""
        return np.asarray(self.client_downlink_bits).astype(np.int64).sum(-1)
