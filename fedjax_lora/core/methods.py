"""The records that an experiment is made of: a method is a factory that returns one, and a round calls no other names.

Structure is in a record's closures; numbers are there too, traced ones, since methods are made inside the program, from
options whose traced fields hold arrays (see `core.numbers`). Between methods pass arrays alone. Each record is written
for one client, or for the server; the round maps clients. Dimension letters are those of `core.types`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.count import Count
from fedjax_lora.core.types import Adapters, Base, Batch, Factors, Scope


class Method(NamedTuple):
    """A method as the catalogue lists it.

    slot: what it does, which is the section of the configuration that chooses it: "sparsifier", "aggregation", ...
    name: by which it is chosen.
    options: frozen dataclass of its options, a subclass of `core.numbers.Options`.
    make: `(options, Context) -> record` of the slot. It runs inside the program: it never branches in Python on a
      traced field, and `options.__post_init__` has checked their values before.
    needs: properties of the rest of an experiment without which it does not work, see `config.catalogue.PROPERTIES`.
    breaks: those that it takes from the experiment. Options may add to both, see `Options.needs`.
    """

    slot: str
    name: str
    options: type
    make: Callable[[Any, "Context"], Any]
    needs: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()


class Context(NamedTuple):
    """What is fixed of an experiment before its numbers: shapes, and the records made earlier.

    num_clients: K. cohort_size: C. num_classes: labels of the task.
    image_shape: `(height, width, channels)` of an image task; None for text.
    rounds: T. local: the section `local` of the configuration, steps and optimizer of the clients.
    like: shapes of the adapters; None before there are any.
    made: slot -> record, of the slots that come earlier in the catalogue.
    """

    num_clients: int
    cohort_size: int
    num_classes: int = 0
    image_shape: tuple[int, int, int] | None = None
    rounds: int = 1
    local: Any = None
    like: Adapters | None = None
    made: Mapping[str, Any] = {}


# -------------------------------------------------------------------------------------------------- what is trained


class Hidden(NamedTuple):
    """What passes between a model's parts.

    values: `[B, S, d]`.
    mask: `[B, S]` 1 for a real position and 0 for padding, float32.
    """

    values: Array
    mask: Array


class Site(NamedTuple):
    """Where an adapter may sit: a frozen matrix of every layer, or columns of one.

    group: `base["layers"][group]["w"]`, `[L, n_in, columns]`, is the matrix.
    first: its first column there.
    n_in, n_out: widths.
    source: name of the module in a Hugging Face checkpoint, with `{layer}`; "" where there is none.
    """

    group: str
    first: int
    n_in: int
    n_out: int
    source: str = ""


class Adapter(NamedTuple):
    """What is trained beside a frozen matrix `w: [n_in, n_out]`.

    init: `(key, sites, num_layers, max_rank, init_scale) -> {name: leaves [L, ...]}` at the start, where it adds
      nothing.
    effective: `(leaves by name, rank_mask [R], scale) -> leaves by name` as a model takes them, with mask and scale
      folded in.
    project: `(x [..., n_in], w, {name: (first column, leaves of one layer)}) -> [..., columns]`: `x @ w` with what the
      adapters of its sites add.
    merge: `leaves by name, effective -> {name: [L, n_in, n_out]}`: what they add to the weights.
    """

    init: Callable[[Array, Mapping[str, Site], int, int, ArrayLike], dict[str, Any]]
    effective: Callable[[Mapping[str, Any], Array, ArrayLike], dict[str, Any]]
    project: Callable[[Array, Array, Mapping[str, tuple[int, Any]]], Array]
    merge: Callable[[Mapping[str, Any]], dict[str, Array]]


class Task(NamedTuple):
    """What the model is trained for.

    head: `(key, d) -> leaves` of a fresh head on features of width d.
    read: `(head, features [B, d]) -> outputs [B, ...]`.
    loss: `(outputs, batch, weight [B]) -> scalar`: mean loss over the examples of weight 1, nats.
    score: `(outputs, batch) -> {name: [B]}`: what is summed over a pool; NaN makes the sum "not measured".
    finish: `({name: mean over the pool}) -> {"eval_loss": ..., "eval_accuracy": ...}`.
    weigh: `(own [n_max, ...], count, pool [N, ...]) -> [N]`: how much an example of the pool counts for a client whose
      own examples are the first `count`; None where all count alike.
    """

    head: Callable[[Array, int], dict[str, Array]]
    read: Callable[[Mapping[str, Array], Array], Array]
    loss: Callable[[Array, Batch, Array], Array]
    score: Callable[[Array, Batch], dict[str, Array]]
    finish: Callable[[Mapping[str, Array]], dict[str, Array]]
    weigh: Callable[[Batch, Array, Batch], Array] | None = None


class Model(NamedTuple):
    """A model as pure functions of its frozen weights; `apply` composes three parts that can be cut apart.

    The adapters that these functions receive are effective ones: rank mask and scale are already folded in, see
    `Adapter.effective`. `key` drives dropout; None turns it off.

    init: `key -> base`: random frozen weights.
    init_head: `key -> head`: a fresh task head.
    embed: `(base, batch, key) -> Hidden`.
    layers: `(base, adapters, hidden, key) -> Hidden`.
    task: `(base, adapters, hidden, key) -> [B, ...]` outputs, such as logits.
    sites: name -> where an adapter may sit.
    num_layers: L.
    weights: `() -> base`: pretrained weights, read on the host; None where there are none.
    """

    init: Callable[[Array], Base]
    init_head: Callable[[Array], dict[str, Array]]
    embed: Callable[[Base, Batch, Array | None], Hidden]
    layers: Callable[[Base, Adapters, Hidden, Array | None], Hidden]
    task: Callable[[Base, Adapters, Hidden, Array | None], Array]
    sites: Mapping[str, Site]
    num_layers: int
    weights: Callable[[], Base] | None = None

    def apply(self, base: Base, adapters: Adapters, batch: Batch, key: Array | None = None) -> Array:
        """`[B, ...]` outputs of the task."""
        hidden = self.embed(base, batch, key)
        hidden = self.layers(base, adapters, hidden, key)
        return self.task(base, adapters, hidden, key)


# -------------------------------------------------------------------------------------------------- what is sent


class Size(NamedTuple):
    """What a message consists of; `sparsifiers.payload.bits` is the one place that makes bits of it. Any shape.

    values: numbers that pass through the transforms. tensors: of how many tensors, which may each have a scale.
    exact: numbers that travel in float32, whatever the transforms.
    index_bits: which numbers these are.
    """

    values: Count
    tensors: Count
    exact: Count
    index_bits: Count


class Offer(NamedTuple):
    """What control can choose from, for one client that keeps k = 0 ... R ranks a module.

    tail_energy: `[R + 1]` energy left out; non-increasing, 0 at the structural rank.
    size: `[R + 1]` of the message, or the most that it can be; k = 0 costs what 1 does, and beyond the client's own
      rank it stays.
    """

    tail_energy: Array
    size: Size


class Message(NamedTuple):
    """One client's update on its way.

    tensors: tree of arrays that the transforms may alter (quantise, clip, make noisy); zero where nothing is sent.
    sent: tree of the same structure, masks that broadcast against the tensors: 1 where a value is sent.
    exact, exact_sent: the same for arrays that no transform touches; `()` for none.
    index_bits: Count, of saying which values are sent.
    kept_ranks: float32, mean number of components kept a module.
    dropped_energy: float32, energy of what is left out, `||sum of dropped a_i b_i||_F^2` summed over modules, without
      the scale s.
    """

    tensors: Any
    sent: Any
    index_bits: Count
    kept_ranks: Array
    dropped_energy: Array
    exact: Any = ()
    exact_sent: Any = ()


@struct.dataclass
class Received:
    """One client's update as the server has decoded it.

    adapters: the server's copy of the client's adapters: what was left out is already filled in.
    counted: module name -> `[L, R]`: 1 where the component enters the average, 0 where the client has no say.
    """

    adapters: Adapters
    counted: dict[str, Array]


class Transform(NamedTuple):
    """What happens to the tensors of every message, whatever the sparsifier.

    apply: `(tensors, key) -> tensors` as they arrive.
    bits_per_value: of each number afterwards; None leaves it as it was. bits_per_tensor: more for each tensor.
    """

    apply: Callable[[Any, Array], Any]
    bits_per_value: int | None = None
    bits_per_tensor: int = 0


def _remembers_nothing(trained: Adapters, memory: Any, received: Received, scope: Scope) -> Any:
    return memory


class Sparsifier(NamedTuple):
    """What one client sends, and what it remembers. Written for one client; the round maps it over the cohort.

    offer: `(start, trained, scope) -> Offer`: for control. `start` is the broadcast, and `trained` is equal to it
      outside of the scope.
    encode: `(start, trained, memory, kept, scope, key) -> Message`; `kept` is a float32 scalar, the ranks to keep a
      module: who sends whole ranks rounds it down (`ranks.whole`), who does not sends `kept / r` of the values.
    decode: `(start, message, scope) -> Received`, of the message alone, as the transforms have left it.
    init: `adapters -> memory`: what a client carries from one of its rounds to the next; `()` for nothing.
    remember: `(trained, memory, received, scope) -> memory` of a client that was heard.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to the local loss.
    broadcast: `(adapters, scope, ranks [R]) -> (adapters, Size)`: what the clients start from, of all that is in scope
      at the structural rank, and what a client of these ranks is sent; None for all that is in scope.
    whole_ranks: whether only whole ranks are sent.
    """

    offer: Callable[[Adapters, Adapters, Scope], Offer]
    encode: Callable[[Adapters, Adapters, Any, Array, Scope, Array], Message]
    decode: Callable[[Adapters, Message, Scope], Received]
    init: Callable[[Adapters], Any] = lambda adapters: ()
    remember: Callable[[Adapters, Any, Received, Scope], Any] = _remembers_nothing
    penalty: Callable[[Adapters, Array], Array] = lambda adapters, rank_mask: jnp.zeros(())
    broadcast: Callable[[Adapters, Scope, Array], tuple[Adapters, Size]] | None = None
    whole_ranks: bool = True


# -------------------------------------------------------------------------------------------------- the server


class Live(NamedTuple):
    """Which parts of the adapters take part, as in `Scope`."""

    a: Array | float = 1.0
    b: Array | float = 1.0
    head: Array | float = 1.0


class Traffic(NamedTuple):
    """Which parts of the adapters are at work in a round.

    trained: by the clients; what they hold beyond it is the broadcast.
    sent: by the clients: all that is trained and not personal.
    received: by the clients: what they cannot know before the broadcast, and is shared.
    """

    trained: Live
    sent: Live
    received: Live


class Aggregate(NamedTuple):
    """What the server makes of a round.

    adapters: the new global adapters, before the server optimizer.
    merged: module name -> `[L, n_in, n_out]`, what is added to the frozen weights from now on; `{}` where the
      method never does.
    sparsification_error: `||s * E_s||_F` over all modules; NaN where it is not measured.
    covariance_error: `||s * (sum_k p_k a_k b_k - server's product)||_F` over all modules, of what was received and
      with what was merged in the server's product; `||s * Cov||_F` where the factors are averaged apart.
    """

    adapters: Adapters
    merged: dict[str, Array]
    sparsification_error: Array
    covariance_error: Array


Enter = Callable[[Factors, Factors, Array, Array], tuple[Factors, Array]]
"""What of one layer enters the average, and how much it weighs.

`(broadcast, received [C, ...], counted [C, R], p [C]) -> (factors [C, ...], w [C, R])`; the weights of each component
sum to 1 over the clients, or are 0 where p is.
"""


class Fold(NamedTuple):
    """An average that takes one client after the other, so that updates need not be held for the cohort.

    init: `broadcast -> sums`, as large as one client's update.
    add: `(sums, broadcast, Received of one client, its weight) -> sums`; weights sum to 1 over the cohort, and 0
      changes nothing, not even with NaN.
    finish: `(sums, broadcast) -> adapters`.
    """

    init: Callable[[Adapters], Any]
    add: Callable[[Any, Adapters, Received, Array], Any]
    finish: Callable[[Any, Adapters], Adapters]


def _nothing_more(like: Adapters, clients: int | None, rank: ArrayLike) -> Count:
    return Count.of(0)


class Aggregator(NamedTuple):
    """How the server averages, and what the clients train for it.

    aggregate: `(broadcast, trained [C, ...], Received [C, ...], weights [C], scale, key) -> Aggregate`. `weights` are
      non-negative, sum to 1, and are 0 for a client that is absent; all-zero weights leave the broadcast as it
      is. `trained` is what the clients hold of what they send (for the error norms); `scale` is s = alpha / r.
      In `trained` and in what was received, b is zero in the components that are not a client's own.
    enter: weights of the received factors in the mean product `sum_ki w_ki a_ki b_ki`: `sparsification_error` is the
      distance of the ideal mean from it, and `covariance_error` its distance from the server's product.
    fold: the same average client by client; None where the method needs all at once.
    trains: `round -> Live` that the clients train.
    stale: `(round, everyone) -> Live`: what of the adapters a client cannot know before the broadcast of the round,
      where `everyone` says that all clients are sent every broadcast; None for what they train.
    personal: the parts ("a", "b", "head") that stay with each client from round to round, and are never sent.
    merges: whether `Aggregate.merged` is used.
    resumes: whether clients go on from the factors that they ended their last round with, and count by their change:
      they compute with `a b - a0 b0`, and `aggregate` is given it, in the factors of `ops.products.differences`.
    extra_downlink: `(adapters or their shapes, C, rank) -> Count` of bits of each broadcast but the first, beside the
      adapters; for C it is told None where clients sit out rounds, and may have missed any number of them.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to a client's local loss.
    next_rank: `(broadcast, trained of one client, its rank) -> rank` of its next round; None where ranks stay.
    """

    aggregate: Callable[[Adapters, Adapters, Received, Array, Array, Array], Aggregate]
    enter: Enter
    fold: Fold | None = None
    trains: Callable[[Array], Live] = lambda round_number: Live()
    stale: Callable[[Array, bool], Live] | None = None
    personal: tuple[str, ...] = ()
    merges: bool = False
    resumes: bool = False
    extra_downlink: Callable[[Adapters, int | None, ArrayLike], Count] = _nothing_more
    penalty: Callable[[Adapters, Array], Array] = lambda adapters, rank_mask: jnp.zeros(())
    next_rank: Callable[[Adapters, Adapters, Array], Array] | None = None

    def traffic(self, round_number: Array, everyone: bool) -> Traffic:
        """What is trained, sent and received in a round; `everyone` as of `stale`."""
        trained, stays = self.trains(round_number), dict.fromkeys(self.personal, 0.0)
        received = trained if self.stale is None else self.stale(round_number, everyone)
        return Traffic(trained, trained._replace(**stays), received._replace(**stays))


class Optimizer(NamedTuple):
    """An optax transformation, over trees of any kind: optax's own types name arrays alone.

    init: `params -> state`. update: `(gradient, state, params) -> (update, state)`.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


# -------------------------------------------------------------------------------------------------- local training


class Correction(NamedTuple):
    """A correction of the clients' gradients against their drift apart.

    init_client, init_server: `adapters -> state`, one client's and the server's; `()` for none. A client that has one
      sends the change of it beside its update, and is sent the server's.
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


class Broadcast(NamedTuple):
    """What every client of a round is given.

    base: the frozen weights. pool: the examples. adapters: where all start. live: what they train.
    correction: the server's state of it. scale: s = alpha / r. round: its number.
    """

    base: Base
    pool: Mapping[str, Array]
    adapters: Adapters
    live: Live
    correction: Any
    scale: Array
    round: Array


class Client(NamedTuple):
    """What one client trains on; the round maps over a leading cohort axis.

    rows: `[n_max]` rows of the pool. examples: how many of them are valid. key: the client's own.
    rank: its structural rank. personal, methods: what it carries from its earlier rounds, see `ClientState`.
    """

    rows: Array
    examples: Array
    key: Array
    rank: Array
    personal: dict[str, Any]
    methods: dict[str, Any]


class Trained(NamedTuple):
    """What local training leaves.

    loss: mean over the steps. correction: the client's state of it.
    orthogonality: see `sparsifiers.diagnostics`; measured here, where few clients' adapters are held at a time.
    """

    adapters: Adapters
    loss: Array
    correction: Any
    orthogonality: Array


class Work(NamedTuple):
    """What a round asks of a client beside its update. `[...]`.

    samples: examples that it computes.
    """

    samples: Array


class Trainer(NamedTuple):
    """What a client does in a round.

    train: `(Broadcast, Client) -> Trained`.
    work: `examples that it holds [...] -> Work [...]`.
    """

    train: Callable[[Broadcast, Client], Trained]
    work: Callable[[Array], Work]


# -------------------------------------------------------------------------------------------------- the network


class Radio(NamedTuple):
    """What control knows of the network in a round.

    snr_hz: `[C]` received power over noise density, p * g / N0, Hz; 0 for who cannot be heard.
    start_s: `[C]` seconds at which a client can begin its upload (downlink and compute); 0 for who is absent.
    band_hz: scalar, the band to share.
    power_w: scalar, that all clients send with.
    """

    snr_hz: Array
    start_s: Array
    band_hz: Array
    power_w: Array


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
    observe: `(state of the cohort, Work [C], downlink_bits [C] float32, present [C]) -> Radio`.
    deliver: `(state of the cohort, Work [C], bits [C] float32, share_hz [C], start_s [C], present [C]) -> Delivery`.
    """

    init: Callable[[Array, Array], Any]
    step: Callable[[Any, Array, Array], Any]
    observe: Callable[[Any, Work, Array, Array], Radio]
    deliver: Callable[[Any, Work, Array, Array, Array, Array], Delivery]


# -------------------------------------------------------------------------------------------------- control


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


def _no_queue(state: Any, outcome: Outcome) -> tuple[Any, dict[str, Array]]:
    return state, {}


class Controller(NamedTuple):
    """Who takes part, and how much each sends on which part of the band; it owns its queues.

    allocate: `(state, Observation) -> Decision`, after local training.
    init: `() -> state`, a tree of arrays, before round 1.
    update: `(state, Outcome) -> (state, report)` after the round. The report names scalars: `queue_s` and
      `energy_queue_j` are metrics of their own, any other appears as `control/name`.
    schedule: `(state, key, client_ids [K], Radio [K]) -> priority [K]`, before local training: the clients of the
      highest priorities are the cohort, and none of priority -inf; None for a uniform sample.
    over_the_air: whether uploads and downloads take time and energy; without, there is no network.
    """

    allocate: Callable[[Any, Observation], Decision]
    init: Callable[[], Any] = lambda: ()
    update: Callable[[Any, Outcome], tuple[Any, dict[str, Array]]] = _no_queue
    schedule: Callable[[Any, Array, Array, Radio], Array] | None = None
    over_the_air: bool = True
