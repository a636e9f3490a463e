"""Records of what is sent and what the server makes of it: messages, sparsifiers, transforms, aggregators."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.count import Count
from fedjax_lora.core.types import Adapters, Factors, Scope


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

    Sums add up: those of one group of clients and those of another are those of both.

    init: `broadcast -> sums`, all zero, as large as one client's update.
    add: `(sums, broadcast, Received of one client, its weight) -> sums`; weights sum to 1 over the cohort, and 0
      changes nothing, not even with NaN.
    finish: `(sums, broadcast) -> adapters`.
    """

    init: Callable[[Adapters], Any]
    add: Callable[[Any, Adapters, Received, Array], Any]
    finish: Callable[[Any, Adapters], Adapters]


Ranks = ArrayLike | Mapping[str, Array]
"""One rank for all layers, or module name -> `[L]` where they differ."""

Scale = Array | Mapping[str, Array]
"""One scale s = alpha / r for all layers, or module name -> `[L]` where they differ."""


def _nothing_more(like: Adapters, clients: int | None, rank: Ranks) -> Count:
    return Count.of(0)


class Aggregator(NamedTuple):
    """How the server averages, and what the clients train for it.

    aggregate: `(broadcast, trained [C, ...], Received [C, ...], weights [C], scale, key) -> Aggregate`. `weights` are
      non-negative, sum to 1, and are 0 for a client that is absent; all-zero weights leave the broadcast as it
      is. `trained` is what the clients hold of what they send (for the error norms); `scale` is s = alpha / r, or
      module name -> `[L]` where layers differ.
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
      adapters; for C it is told None where clients sit out rounds, and may have missed any number of them. The rank is
      one for all, or, where layers differ, module name -> `[L]`.
    penalty: `(adapters, rank_mask [R]) -> scalar` added to a client's local loss.
    next_rank: `(broadcast, trained of one client, its rank) -> rank` of its next round; None where ranks stay.
    """

    aggregate: Callable[[Adapters, Adapters, Received, Array, Scale, Array], Aggregate]
    enter: Enter
    fold: Fold | None = None
    trains: Callable[[Array], Live] = lambda round_number: Live()
    stale: Callable[[Array, bool], Live] | None = None
    personal: tuple[str, ...] = ()
    merges: bool = False
    resumes: bool = False
    extra_downlink: Callable[[Adapters, int | None, Ranks], Count] = _nothing_more
    penalty: Callable[[Adapters, Array], Array] = lambda adapters, rank_mask: jnp.zeros(())
    next_rank: Callable[[Adapters, Adapters, Array], Array] | None = None

    def traffic(self, round_number: Array, everyone: bool) -> Traffic:
        """What is trained, sent and received in a round; `everyone` as of `stale`."""
        trained, stays = self.trains(round_number), dict.fromkeys(self.personal, 0.0)
        received = trained if self.stale is None else self.stale(round_number, everyone)
        return Traffic(trained, trained._replace(**stays), received._replace(**stays))
