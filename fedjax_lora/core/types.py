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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from fedjax_lora.core.count import Count

Base = Any
"""Frozen weights of a model: a pytree whose `layers` leaves are stacked to `[L, ...]`."""

Batch = Mapping[str, Array]
"""Model inputs with a leading axis `B`, `label: [B]` int32, and what some tasks learn beside it.

`target` is `[B]` float32, a number for each example, or `[B, S]` int32, a class or a token for each position.
"""

IGNORED = -100
"""The target of a position that does not count, as in PyTorch."""


class Packing(NamedTuple):
    """Shapes in which a batch is packed, see `data.packing`; static.

    rows: G, over which its examples are dealt, whether or not it divides their number. widths: P, in increasing order.
    """

    rows: int
    widths: tuple[int, ...]


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
class Scope:
    """What of its adapters a client trains, or sends, in one round: masks, so that one program serves every choice.

    ranks: `[R]`, 1 for the rank components in use, 0 for the others.
    a, b, head: float32 scalars, 1 where the factor or the head takes part, else 0.
    layer_ranks: module name -> `[L]`, the most components that a layer has; `{}` where all layers have R.
    """

    ranks: Array
    a: Array
    b: Array
    head: Array
    layer_ranks: Mapping[str, Array] = struct.field(default_factory=dict)

    @classmethod
    def whole(cls, ranks: Array) -> "Scope":
        """Both factors, in these ranks, and the head."""
        return cls(ranks=jnp.asarray(ranks), a=jnp.ones(()), b=jnp.ones(()), head=jnp.ones(()))

    def of_module(self, name: str) -> Array:
        """`[R]` of a module, or `[L, R]` where its layers differ: 1 for the components in use."""
        if name not in self.layer_ranks:
            return self.ranks
        return self.ranks * (jnp.arange(self.ranks.shape[-1]) < self.layer_ranks[name][:, None])

    def select(self, inside: Adapters, outside: Adapters) -> Adapters:
        """`inside` where it is in scope, `outside` elsewhere."""
        modules = {}
        for name, old in outside.modules.items():
            new, ranks = inside.modules[name], self.of_module(name)
            in_a, in_b = (ranks * self.a > 0)[..., None, :], (ranks * self.b > 0)[..., None]
            modules[name] = Factors(a=jnp.where(in_a, new.a, old.a), b=jnp.where(in_b, new.b, old.b))
        head = jax.tree.map(lambda new, old: jnp.where(self.head > 0, new, old), inside.head, outside.head)
        return Adapters(modules=modules, head=head)


@struct.dataclass
class Dataset:
    """A federated data set on the device.

    train: pool of examples, leaves `[N, ...]`, shared by all clients through `index`.
    index: `[K, n_max]` int32 rows of `train`; row k holds `count[k]` valid entries, then padding (any valid row). Of a
      population that is sampled, what draws them: it is indexed alike by `[...]` clients.
    count: `[K]` int32 examples of each client.
    test: pool of held-out examples, leaves `[N_test, ...]`.
    """

    train: dict[str, Array]
    index: Any
    count: Array
    test: dict[str, Array]


@struct.dataclass
class ClientState:
    """What every client carries from one of its rounds to the next; leaves are `[K, ...]`.

    rank: its structural rank, float32.
    personal: the parts of the adapters that stay with it: part ("a", "b", "head") -> leaves; `{}` for none.
    methods: slot -> the state of that slot's method, such as the memory of the sparsifier; `()` for none.
    """

    rank: Array
    personal: dict[str, Any]
    methods: dict[str, Any]


@struct.dataclass
class FedState:
    """All that a run carries from one round to the next.

    key: the run's key; a round's keys are `fold_in(key, round)`.
    round: int32 scalar, rounds done.
    numbers: dotted key of the configuration -> float32: the traced numbers, constant over a run, see `core.numbers`.
    adapters: global adapters.
    merged: module name -> `[L, n_in, n_out]` added to the frozen weights; `{}` for none.
    elapsed_s: simulated seconds so far.
    methods: slot -> the state of that slot's method, such as the queues of the controller; `()` for none.
    clients: what each client carries.
    """

    key: Array
    round: Array
    numbers: dict[str, Array]
    adapters: Adapters
    merged: dict[str, Array]
    elapsed_s: Array
    methods: dict[str, Any]
    clients: ClientState


@struct.dataclass
class Metrics:
    """What is observed of a round; stacked to `[rounds, ...]` by a run. NaN stands for "not measured".

    round: int32, counted from 1.
    train_loss: mean over the participants of their mean local loss of the task.
    eval_loss, eval_accuracy: of the global adapters on the held-out pool, after the round. Where clients keep parts,
      these are the mean over all clients: what one would give to a newcomer, see `sim.kept.deployed`.
    personal_accuracy: of the clients' own adapters where they keep some, see `sim.evaluate.make_evaluate_personal`.
    latency_s: seconds until the last upload ended; a client that can never be heard is not waited for.
    elapsed_s: the sum of latency_s so far.
    uplink, downlink: `[C]` counts of bits, 0 for who did not send or receive; an upload that was lost to fading counts.
    energy_j: of the whole cohort.
    queue_s, energy_queue_j: virtual queues after the round; 0 where the controller has none.
    keep_ratio_mean, kept_ranks_mean: what control planned and what was sent, over the participants.
    participants: clients whose update entered the average.
    absent_weight: 1 minus the participants' part of the weight of all clients, by `clients.weighting`: 0 where all took
      part. Its square is what the round costs in the bound of docs/split.md.
    outages: scheduled clients whose upload did not arrive.
    nonfinite_clients: clients left out because their update was not finite.
    sparsification_error, covariance_error: norms of the two terms that separate the server's product from the
      ideal average of products.
    dropped_energy: mean over the participants.
    tail_energy: `[R + 1]`, the importance profile: see `methods.Offer`, mean over the participants.
    orthogonality: largest |cosine| between two rank components of a module, mean over the participants.
    methods: `slot/name` -> scalar, what else the methods report. Those of the task are measured with `eval_loss`;
      `task/worst_tenth_accuracy` is the mean over the tenth of all clients whose accuracy is the least, of their own
      adapters where they keep some, else of the global ones, each on examples like its own, see `Task.weigh`.
    """

    round: Array
    train_loss: Array
    eval_loss: Array
    eval_accuracy: Array
    personal_accuracy: Array
    latency_s: Array
    elapsed_s: Array
    uplink: Count
    downlink: Count
    energy_j: Array
    queue_s: Array
    energy_queue_j: Array
    keep_ratio_mean: Array
    kept_ranks_mean: Array
    participants: Array
    absent_weight: Array
    outages: Array
    nonfinite_clients: Array
    sparsification_error: Array
    covariance_error: Array
    dropped_energy: Array
    tail_energy: Array
    orthogonality: Array
    methods: dict[str, Array]

    @property
    def uplink_bits(self) -> np.ndarray:
        """`[...]` int64 uplink bits of the cohort."""
        return self.client_uplink_bits.sum(-1)

    @property
    def downlink_bits(self) -> np.ndarray:
        """`[...]` int64 downlink bits, summed over the receivers."""
        return self.client_downlink_bits.sum(-1)

    @property
    def client_uplink_bits(self) -> np.ndarray:
        """`[..., C]` int64 uplink bits of each client."""
        return self.uplink.exact()

    @property
    def client_downlink_bits(self) -> np.ndarray:
        """`[..., C]` int64 downlink bits of each client."""
        return self.downlink.exact()
