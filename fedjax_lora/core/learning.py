"""Records of what is trained: models and their adapters, tasks, optimizers, and a client's part of a round."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from flax import struct
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Live
from fedjax_lora.core.types import Adapters, Base, Batch, Scope


class Places(NamedTuple):
    """What lies where in rows that several examples share, see `data.packing`.

    example: `[G, P]` int32, the number of the example that each place holds a position of; B for none.
    position: `[G, P]` int32, which of its positions.
    first: `[B]` int32, the place of the first position of each example, counted through all rows.
    """

    example: Array
    position: Array
    first: Array


class Hidden(NamedTuple):
    """What passes between a model's parts.

    values: `[G, P, d]`, which is `[B, S, d]` where each example has a row of its own.
    mask: `[G, P]` 1 for a real position and 0 for padding, float32.
    places: of rows that several examples share; None where each has its own.
    """

    values: Array
    mask: Array
    places: Places | None = None


class Site(NamedTuple):
    """Where an adapter may sit: a frozen matrix of every layer, or columns of one.

    group: `base["layers"][group]["w"]`, `[L, n_in, columns]`, is the matrix.
    first: its first column there.
    n_in, n_out: widths.
    source: name of the module in a Hugging Face checkpoint, with `{layer}`; "" where there is none.
    roles: `query`, `key`, `value`, `output`, `up`, `down`: names that hold for every family, where its own is another.
    """

    group: str
    first: int
    n_in: int
    n_out: int
    source: str = ""
    roles: tuple[str, ...] = ()


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


@struct.dataclass
class Logits:
    """Logits of the token that follows each position, computed when they are called for: all, or some at a time.

    values: `[..., d]` of the positions. words: `[V, d]`, the model's own table.
    product: `(values, words) -> [..., V]`.
    """

    values: Array
    words: Array
    product: Callable[[Array, Array], Array] = struct.field(pytree_node=False)

    def __call__(self) -> Array:
        """All of them."""
        return self.product(self.values, self.words)

    @property
    def size(self) -> int:
        """How many they are."""
        return self.values.size // self.values.shape[-1] * self.words.shape[0]


class Features(NamedTuple):
    """What a task may read of a model.

    hidden: after the last layer, normalised where the model ends in a norm.
    pooled: `() -> [B, d]`: one vector for each example, as the model's pooling has it.
    logits: `() -> [G, P, vocabulary]` of the token that follows each position, by the model's own table: Logits, where
      a task may compute some at a time; None where the model has none.
    """

    hidden: Hidden
    pooled: Callable[[], Array]
    logits: Callable[[], Array] | None = None


Learned = Literal["label", "number", "token_label", "next_token"]
"""What a task learns of examples, beside whose `label: [B]` int32 stands the `target` that it asks for.

label: the label itself; no target. number: `[B]` float32. token_label: `[B, S]` int32, the class of each position.
next_token: `[B, S]` int32, the token that follows each position. IGNORED is where a position does not count.
"""


class Task(NamedTuple):
    """What the model is trained for.

    head: `(key, d, bias) -> leaves` of a fresh head on features of width d, with a bias or, as on a language model's
      last position, without; `{}` for none.
    read: `(head, Features) -> outputs`, `[B, ...]` or, of each position, `[G, P, ...]`, or Logits that are too many to
      be held.
    loss: `(outputs, batch, weight [B]) -> scalar`: mean loss over the examples of weight 1, or over their positions
      that count.
    score: `(outputs, batch) -> {name: [B]}`: what `finish` needs to know of each example.
    finish: `({name: [N]} of a pool, weight [N]) -> {"eval_loss": ..., "eval_accuracy": ...}`, with NaN for what the
      task does not measure, and more by other names, which become `task/name` of the metrics. Examples of weight 0 are
      passed over; NaN in the score of another makes what it enters NaN, "not measured".
    weigh: `(own [n_max, ...], count, pool [N, ...]) -> [N]`: how much an example of the pool counts for a client whose
      own examples are the first `count`; None where all count alike.
    learns: what it asks of the examples.
    judged_by: what a run shows of an evaluation: `accuracy`, or another name that `finish` finds.
    """

    head: Callable[[Array, int, bool], dict[str, Array]]
    read: Callable[[Mapping[str, Array], Features], Any]
    loss: Callable[[Any, Batch, Array], Array]
    score: Callable[[Any, Batch], dict[str, Array]]
    finish: Callable[[Mapping[str, Array], Array], dict[str, Array]]
    weigh: Callable[[Batch, Array, Batch], Array] | None = None
    learns: Learned = "label"
    judged_by: str = "accuracy"

    @property
    def by_position(self) -> bool:
        """Whether there is a label of each position, not one of each example."""
        return self.learns in ("token_label", "next_token")


class Model(NamedTuple):
    """A model as pure functions of its frozen weights; `apply` composes three parts that can be cut apart.

    The adapters that these functions receive are effective ones: rank mask and scale are already folded in, see
    `Adapter.effective`. `key` drives dropout; None turns it off.

    init: `key -> base`: random frozen weights.
    init_head: `key -> head`: a fresh task head.
    embed: `(base, batch, key) -> Hidden`.
    layers: `(base, adapters, hidden, key) -> Hidden`.
    task: `(base, adapters, hidden, key) -> outputs`, such as logits: see `Task.read`.
    sites: name -> where an adapter may sit.
    num_layers: L.
    packs: whether it takes batches whose examples share rows, see `data.packing`: `embed` says in `Hidden.places` what
      lies where, by `example_ids`, `position_ids` and `first_places` of the batch; `layers` let no position see another
      example and pass the places on; `task` reads each example by its own positions, of which there may be none.
    weights: `() -> base`: pretrained weights, read on the host; None where there are none.
    axes: path of a frozen weight in the base, its keys joined by `/` -> the logical name of each of its axes, see
      `sim.placement`; a weight that is not there is split by its shape.
    """

    init: Callable[[Array], Base]
    init_head: Callable[[Array], dict[str, Array]]
    embed: Callable[[Base, Batch, Array | None], Hidden]
    layers: Callable[[Base, Adapters, Hidden, Array | None], Hidden]
    task: Callable[[Base, Adapters, Hidden, Array | None], Any]
    sites: Mapping[str, Site]
    num_layers: int
    packs: bool = False
    weights: Callable[[], Base] | None = None
    axes: Mapping[str, tuple[str | None, ...]] = {}

    def apply(self, base: Base, adapters: Adapters, batch: Batch, key: Array | None = None) -> Any:
        """Outputs of the task, see `Task.read`."""
        hidden = self.embed(base, batch, key)
        hidden = self.layers(base, adapters, hidden, key)
        return self.task(base, adapters, hidden, key)


class Optimizer(NamedTuple):
    """An optax transformation, over trees of any kind: optax's own types name arrays alone.

    init: `params -> state`. update: `(gradient, state, params) -> (update, state)`.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


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
    """What a round asks of a client, and of the server for it, beside its update. `[...]`.

    samples: examples that it computes; of a part of the model, as its share of the FLOP of a whole training step.
    server_samples: the same, which the server computes.
    up_bits, down_bits: float32, of what it exchanges with the server while it trains.
    server_hz: at which the server computes for it; None is the network's own frequency.

    None is nothing.
    """

    samples: Array
    server_samples: Array | None = None
    up_bits: Array | None = None
    down_bits: Array | None = None
    server_hz: Array | None = None


class Exchange(NamedTuple):
    """What a client and the server exchange while it trains, in one round.

    up, down: counts of bits. device_share, server_share: of the FLOP of a whole training step.
    """

    up: Count
    down: Count
    device_share: Array
    server_share: Array


def split_work(samples: Array, exchange: Exchange) -> Work:
    """The work of clients whose whole training would be of so many samples."""
    return Work(
        samples=samples * exchange.device_share,
        server_samples=samples * exchange.server_share,
        up_bits=exchange.up.float32(),
        down_bits=exchange.down.float32(),
    )


class Trainer(NamedTuple):
    """What a client does in a round.

    train: `(Broadcast, Client) -> Trained`, of one client alone.
    work: `examples that it holds [...] -> Work [...]`, were all of it the client's.
    exchange: `(base, pool, Client, state) -> Exchange` of one client; None where nothing passes while it trains.
    together: `(Broadcast, Client [C], here [C]) -> Trained [C]` of all who are here, where a step of one client needs
      what the steps of others have left; None where each trains apart.
    in_turn: whether clients begin one after another, each with the whole band, downlink and server for itself.
    choose: `(Work -> Radio of the clients, samples [C], Exchange [C, M]) -> (Work [C], Exchange [C])`: which of M ways
      to split its model each client takes, where `exchange` has a leading axis of them; None where there is one way.
    overlapping: steps of a round that overlap: while the server computes one, the next is sent, and the client computes
      the one after it; 1 for none.
    init: `() -> state` of the server before round 1, a tree of arrays.
    hold: `(state, Client [C], heard [C]) -> state` after a round.
    """

    train: Callable[[Broadcast, Client], Trained]
    work: Callable[[Array], Work]
    exchange: Callable[[Base, Mapping[str, Array], Client, Any], Exchange] | None = None
    together: Callable[[Broadcast, Client, Array], Trained] | None = None
    in_turn: bool = False
    choose: Callable[[Callable[[Work], Any], Array, Exchange], tuple[Work, Exchange]] | None = None
    overlapping: int = 1
    init: Callable[[], Any] = lambda: ()
    hold: Callable[[Any, Client, Array], Any] = lambda state, clients, heard: state
