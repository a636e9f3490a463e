"""Split training: the first and last layers of the model at the device, the others at the edge server.

After Z. Wang, Y. Zhou, Y. Shi, K. B. Letaief, "Federated Fine-Tuning for Pre-Trained Foundation Models Over Wireless
Networks", arXiv 2407.02924: embedding and task module at the device, encoder with adapters at the server. Activations
and their gradients cross the air in every local step. The server holds a copy of its adapters for each device, and
averages them at the end of the round, or one that all step in turn; what is at the devices is averaged over the air, as
in ordinary federated LoRA.
Frozen device layers, through which no gradient comes back, are SplitFrozen (arXiv 2503.18986). With full precision a
step is that of ordinary federated LoRA, but for a sparsifier's penalty, of the device's adapters alone, and for which
places dropout draws. See docs/split.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.count import Count, total
from fedjax_lora.core.learning import Client, Exchange, Hidden, Model, Task, Trainer
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.sides import Side, TrainingOptions
from fedjax_lora.core.types import Adapters, Base
from fedjax_lora.data.batches import gather
from fedjax_lora.ops.primitives import pack
from fedjax_lora.training.local import alone, drawn_batches, steps_of, whole_work
from fedjax_lora.training.shared import together

Precision = Literal["float32", "bfloat16", "int8"]

VALUE_BITS: dict[Precision, int] = {"float32": 32, "bfloat16": 16, "int8": 8}
SCALE_BITS: dict[Precision, int] = {"float32": 0, "bfloat16": 0, "int8": 32}
"""Of each tensor that crosses."""

LABEL_BITS = 32
"""Of each label, or target of a position, where the task module is at the server."""

_LEAST = 1e-35  # of which 1/127 is a normal float32; a tensor below it crosses as zeros

Crossing = Callable[[Array, Array], Array]
"""`(values [B, S, d], mask [B, S]) -> values` as they arrive; the gradient on its way back is rounded alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitOptions(TrainingOptions):
    """Where the model is cut, and what passes there; every default is our choice.

    device_layers: first layers that are at the device, with the embedding.
    tail_layers: last layers that are at the device, with the task module.
    device_adapters: whether the adapters of the device's layers are trained, and averaged over the air. The first
      layers are forward only where they are frozen: no gradient comes back to them.
    task: where the head is. At the server it needs no second cut, but labels are sent to it.
    server_adapters: whether the server holds a copy for each device, which are `averaged`, or one that is `shared`, see
      `training.shared`.
    exchange: in which activations and gradients cross: `int8` with a scale for each tensor, `127 / max |x|`.
    order: whether devices train side by side (`parallel`), or one after another with the whole band, downlink and
      server for each (`sequential`): the round then takes as long as all of them together.
    cache_activations: whether the server keeps the activations that crossed the first cut, where nothing below it is
      trained, so that those of an example are sent once in a run.
    pipelined: whether the steps of a device overlap: it computes a batch while it sends the one before, and the server
      computes the one before that. Only where the device needs nothing back from the server. Controllers plan as if
      steps did not overlap.
    count_padding: whether padded positions are counted too; what they hold changes nothing.
    """

    name: Literal["split"] = "split"
    device_layers: int = 0
    tail_layers: int = 0
    device_adapters: Literal["trained", "frozen"] = "trained"
    task: Literal["device", "server"] = "device"
    server_adapters: Literal["averaged", "shared"] = "averaged"
    exchange: Precision = "float32"
    order: Literal["parallel", "sequential"] = "parallel"
    cache_activations: bool = False
    pipelined: bool = False
    count_padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("device_layers", "tail_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.task == "server" and self.tail_layers:
            raise ValueError(f"tail_layers must be 0 where task is server, got {self.tail_layers}")
        for name in ("cache_activations", "pipelined"):
            if getattr(self, name) and self.trains_below:
                raise ValueError(f"device_adapters must be frozen where {name} is true, got 'trained'")
        if self.pipelined and self.task == "device":
            raise ValueError("task must be server where pipelined is true, got 'device'")
        if self.cache_activations and self.exchange == "int8":
            raise ValueError(
                "exchange must be float32 or bfloat16 where cache_activations is true, since a scale is of a whole "
                "batch, got 'int8'"
            )

    @property
    def trains_below(self) -> bool:
        """Whether anything below the first cut is trained; the embedding never is."""
        return self.device_layers > 0 and self.device_adapters == "trained"

    def needs(self) -> dict[str, str]:
        kept = {"no_dropout": "cache_activations"} if self.cache_activations else {}
        if self.pipelined or self.order == "sequential":
            kept["free_broadcast"] = "pipelined" if self.pipelined else "order"
        return kept

    def breaks(self) -> dict[str, str]:
        shared = {"trained_apart": "server_adapters"} if self.server_adapters == "shared" else {}
        return shared | ({"side_by_side": "order"} if self.order == "sequential" else {})

    def side(self, num_layers: int) -> Side | None:
        """The layers at the device whose adapters are trained, and the head where it is there.

        Raises:
          ValueError: the server has no layer left.
        """
        if self.device_layers + self.tail_layers >= num_layers:
            raise ValueError(
                f"training.device_layers + training.tail_layers must be below {num_layers}, the model's layers, got "
                f"{self.device_layers} + {self.tail_layers}"
            )
        head = self.task == "device"
        if self.device_adapters == "frozen":
            return Side((), head)
        tail = range(num_layers - self.tail_layers, num_layers)
        return Side((*range(self.device_layers), *tail), head)


def make(options: SplitOptions, context: Context) -> Trainer:
    """Training in which the server computes the layers between the cuts."""
    model: Model = context.made["model"]
    side, in_turn = options.side(model.num_layers), options.order == "sequential"
    assert side is not None  # a part of the model is always at the server
    steps = steps_of(context, cut_model(options, model), lambda tree: _moving(options, model.num_layers, tree))

    def drawn(client: Client) -> tuple[Array, Array]:
        return drawn_batches(jax.random.split(client.key)[0], client, context.local)

    def exchange(base: Base, pool: Mapping[str, Array], client: Client, held: Any) -> Exchange:
        up, down = _crossing(options, context, base, pool, *drawn(client), held)
        return Exchange(up, down, *_shares(options, model.num_layers))

    def hold(held: Any, clients: Client, heard: Array) -> Any:
        if not options.cache_activations:
            return held
        rows, weight = jax.vmap(drawn)(clients)
        return held.at[rows].max((weight > 0) & heard[:, None, None])

    return Trainer(
        train=alone(steps),
        work=whole_work(context.local),
        exchange=exchange,
        together=together(steps, side, in_turn) if options.server_adapters == "shared" else None,
        in_turn=in_turn,
        overlapping=context.local.steps if options.pipelined else 1,
        init=(lambda: jnp.zeros(context.num_examples, bool)) if options.cache_activations else tuple,
        hold=hold,
    )


METHOD = Method("training", "split", SplitOptions, make, breaks=frozenset({"whole_at_client"}))


# ------------------------------------------------------------------------------------------------ the model, cut


def cut_model(options: SplitOptions, model: Model) -> Model:
    """The model with what crosses a cut rounded to the exchange's precision, forward and backward."""
    first, last = options.device_layers, model.num_layers - options.tail_layers
    cross = crossing(options.exchange)

    def layers(base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
        hidden = _run(model, base, adapters, hidden, key, 0, first)
        if options.device_adapters == "frozen":
            hidden = lax.stop_gradient(hidden)
        hidden = _run(model, base, adapters, _crossed(hidden, cross), key, first, last)
        if options.task == "server":
            return hidden
        return _run(model, base, adapters, _crossed(hidden, cross), key, last, model.num_layers)

    return model._replace(layers=layers)


def _run(
    model: Model, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None, first: int, last: int
) -> Hidden:
    """The layers from `first` to before `last`."""
    if first == last:
        return hidden
    weights = jax.tree.map(lambda leaf: pack(leaf)[first:last], base["layers"])
    modules = jax.tree.map(lambda leaf: leaf[first:last], adapters.modules)
    own_key = None if key is None else jax.random.fold_in(key, 2 + first)  # 0 and 1 are the model's own
    return model.layers({**base, "layers": weights}, Adapters(modules, adapters.head), hidden, own_key)


def _crossed(hidden: Hidden, cross: Crossing) -> Hidden:
    """What arrives: of real positions alone, since no other is sent."""
    return hidden._replace(values=cross(hidden.values, hidden.mask))


def crossing(precision: Precision) -> Crossing:
    """What happens to values on their way, and to their gradient on its way back."""
    if precision == "float32":
        return lambda values, mask: values

    @jax.custom_vjp
    def cross(values: Array, mask: Array) -> Array:
        return rounded(values * mask[..., None], precision)

    def forward(values: Array, mask: Array) -> tuple[Array, Array]:
        return cross(values, mask), mask

    def backward(mask: Array, gradient: Array) -> tuple[Array, None]:
        return rounded(gradient * mask[..., None], precision), None

    cross.defvjp(forward, backward)
    return cross


def rounded(values: Array, precision: Precision) -> Array:
    """`[...]` in the precision, in their own dtype; `int8` to the nearest of 255 levels, halves to even."""
    if precision == "bfloat16":
        return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)  # a cast there and back may be left out
    largest = jnp.max(jnp.abs(values), initial=0.0)
    step = jnp.where(largest > _LEAST, largest, 1.0) / 127.0
    return jnp.round(values / step) * step


def _moving(options: SplitOptions, num_layers: int, adapters: Adapters) -> Adapters:
    """A gradient or an update with zeros where adapters are frozen."""
    if options.device_adapters == "trained":
        return adapters
    number = jnp.arange(num_layers)
    moves = (number >= options.device_layers) & (number < num_layers - options.tail_layers)

    def of_layers(leaf: Array) -> Array:
        return jnp.where(moves.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0.0)

    return Adapters(modules=jax.tree.map(of_layers, adapters.modules), head=adapters.head)


# ------------------------------------------------------------------------------------------- what it costs


def _crossing(
    options: SplitOptions,
    context: Context,
    base: Base,
    pool: Mapping[str, Array],
    rows: Array,
    weight: Array,
    held: Any,
) -> tuple[Count, Count]:
    """Bits up and down of a round's steps `[E, B]`: a value for each real position and feature of a batch.

    Activations go up at the first cut, and down again at the second; gradients the other way. At the first cut there is
    none where nothing below it is trained: the embedding is frozen.
    """
    hidden = context.made["model"].embed(base, gather(pool, rows.ravel()), None)
    real = jnp.sum(hidden.mask.reshape(*rows.shape, -1), -1)
    positions = jnp.full_like(real, hidden.mask.shape[-1]) if options.count_padding else real
    steps, width = jnp.sum(jnp.any(weight > 0, -1)), hidden.values.shape[-1]

    def tensors(sent: Array) -> Count:
        values = Count.of(jnp.sum(positions * sent).astype(jnp.uint32)) * width * VALUE_BITS[options.exchange]
        return values + Count.of(steps) * SCALE_BITS[options.exchange]

    every = tensors(weight)
    up = [tensors(weight * not_held(rows, weight, held)) if options.cache_activations else every]
    down = [every] if options.trains_below else []
    if options.task == "device":
        up, down = [*up, every], [*down, every]
    else:
        up.append(num_labels(context.made["task"], real, weight) * LABEL_BITS)
    return total(up), total(down)


def num_labels(task: Task, real: Array, weight: Array) -> Count:
    """Labels of batches `[E, B]`: one an example or, as the task learns, one a real position, `real [E, B]`."""
    return Count.of(jnp.sum(real * weight if task.by_position else weight).astype(jnp.uint32))


def not_held(rows: Array, weight: Array, held: Array) -> Array:
    """`[E, B]` bool: where an example of the pool is sent that is not held `[N]` yet, and no earlier in the round."""
    flat = jnp.where(weight > 0, rows, -1).ravel()
    order = jnp.argsort(flat, stable=True)
    again = jnp.concatenate([jnp.zeros(1, bool), flat[order][1:] == flat[order][:-1]])
    return (~jnp.zeros_like(again).at[order].set(again)).reshape(rows.shape) & ~held[rows]


def _shares(options: SplitOptions, num_layers: int) -> tuple[Array, Array]:
    """Of the FLOP of a whole training step, the device's and the server's.

    All is in the layers, which take as long backward as forward, since they are frozen (Our choice: embedding and head
    are not counted). Frozen first layers are forward only.
    """
    first, tail = options.device_layers, options.tail_layers
    backward = 0 if options.device_adapters == "frozen" else first
    device = (first + backward + 2 * tail) / (2 * num_layers)
    server = (num_layers - first - tail) / num_layers
    return jnp.float32(device), jnp.float32(server)
