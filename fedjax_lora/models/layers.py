"""What the model families share: projections with adapters, a transformer block, the scan over layers, pooling.

A block is written for one layer. A model stacks the weights of its layers to `[L, ...]` and scans the block over
them, so that neither the program nor its compile time grows with depth.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core.learning import Adapter, Features, Hidden, Logits, Model, Places, Site, Task
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.models import table
from fedjax_lora.ops.primitives import attention, gelu, layer_norm, pack, project, unpack

Pooling = Literal["mean", "cls", "last"]
"""What a head sees of an example: the mean of its real positions, the first or the last of them."""

ACTIVATIONS: dict[str, Callable[[Array, str], Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x, dtype: _in_float32(jax.nn.gelu, x),
    "gelu_pytorch_tanh": lambda x, dtype: _in_float32(jax.nn.gelu, x),
    "relu": lambda x, dtype: jax.nn.relu(x),
    "silu": lambda x, dtype: _in_float32(jax.nn.silu, x),
}
"""Activations by the name that Hugging Face gives them: `(x, dtype of what the backward pass of gelu keeps)`."""


def _in_float32(activation: Callable[[Array], Array], x: Array) -> Array:
    return activation(x.astype(jnp.float32)).astype(x.dtype)


Project = Callable[[Array, Array, Mapping[str, tuple[int, Any]]], Array]
"""`Adapter.project`."""

Block = Callable[[Mapping[str, Any], Array, Hidden, Mapping[str, Any], Array | None], Array]
"""`(weights of one layer, x [G, P, d], what is around it, adapters of the layer, key) -> [G, P, d]`.

Of the Hidden mask and places are read, not the values.
"""


def dropout(x: Array, rate: float, key: Array | None, places: Places | None = None) -> Array:
    """`x` `[G, P, d]` with elements zeroed at `rate` and the rest scaled up; `x` itself without a key.

    What is zeroed of a position depends on its example's number and on its own, not on where it lies.
    """
    if key is None or rate == 0:
        return x
    example, position = jnp.indices(x.shape[:2]) if places is None else (places.example, places.position)

    def kept(example: Array, position: Array) -> Array:
        own_key = jax.random.fold_in(jax.random.fold_in(key, example), position)
        return jax.random.bernoulli(own_key, 1 - rate, x.shape[2:])

    return jnp.where(jax.vmap(jax.vmap(kept))(example, position), x / (1 - rate), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Projections of one input, side by side in one frozen matrix, each with an adapter or none.

    sites: of the model. project: of the adapter.
    """

    sites: Mapping[str, Site]
    project: Project

    def __call__(self, group: str, weights: Mapping[str, Any], x: Array, adapters: Mapping[str, Any]) -> Array:
        """`[G, P, n_in] -> [G, P, columns]` by `weights[group]`; `adapters`: effective leaves by site."""
        own = {
            name: (site.first, adapters[name])
            for name, site in self.sites.items()
            if site.group == group and name in adapters
        }
        y = self.project(x, weights[group]["w"], own)
        return y + weights[group]["b"].astype(y.dtype) if "b" in weights[group] else y


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerBlock:
    """A Block of self-attention and a two-layer perceptron, each in a residual branch, with layer normalisation.

    Its weights are `query_key_value`, `output`, `up`, `down`, `norm_attention` and `norm_mlp`.

    dense: its projections `query_key_value`, `output`, `up` and `down`.
    num_heads: attention heads; they divide the width.
    activation: name in ACTIVATIONS.
    norm_eps: of the layer normalisations.
    pre_norm: whether a branch normalises its input (ViT, GPT-2) or its sum with the residual stream (BERT).
    causal: whether a position looks at none after it.
    dropout: rate on the output of each branch.
    dtype: of the frozen matrices, their products, and what the backward pass keeps.
    """

    dense: Dense
    num_heads: int
    activation: str
    norm_eps: float
    pre_norm: bool
    dropout: float
    dtype: str
    causal: bool = False

    def __call__(
        self, weights: Mapping[str, Any], x: Array, around: Hidden, adapters: Mapping[str, Any], key: Array | None
    ) -> Array:
        """See Block."""
        keys = (None, None) if key is None else jax.random.split(key)
        places = around.places

        y = self._norm(weights["norm_attention"], x) if self.pre_norm else x
        qkv = self.dense("query_key_value", weights, y, adapters)
        example = None if places is None else places.example
        y = attention(qkv, around.mask, self.num_heads, self.dtype, example, causal=self.causal)
        y = self.dense("output", weights, y, adapters)
        x = x + dropout(y, self.dropout, keys[0], places)
        x = x if self.pre_norm else self._norm(weights["norm_attention"], x)

        y = self._norm(weights["norm_mlp"], x) if self.pre_norm else x
        y = self.dense("up", weights, y, adapters)
        y = ACTIVATIONS[self.activation](y, self.dtype)
        y = self.dense("down", weights, y, adapters)
        x = x + dropout(y, self.dropout, keys[1], places)
        return x if self.pre_norm else self._norm(weights["norm_mlp"], x)

    def _norm(self, weights: Mapping[str, Array], x: Array) -> Array:
        return layer_norm(x, (weights["scale"], weights["bias"]), self.norm_eps, self.dtype)


def transformer(
    config: Any,
    rows: table.Table,
    task: Task,
    adapter: Adapter,
    *,
    width: int,
    embed: Callable[[Any, Base, Batch, Array | None], Hidden],
    features: Callable[[Any, Base, Hidden], Features],
    pre_norm: bool,
    causal: bool = False,
    packs: bool = False,
    first: Sequence[str] = (),
) -> Model:
    """A stack of TransformerBlocks with the head of a task on top.

    Args:
      config: Shape, with `activation` and `norm_eps`; both functions are given it first.
      rows: all frozen weights.
      task: what is read of the positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
      width: of the model, d.
      embed: what the first layer takes.
      features: what the task reads after the last one.
      pre_norm, causal: see TransformerBlock.
      packs: see Model.
      first: see `table.init`.
    """
    block = TransformerBlock(
        dense=Dense(sites=table.sites(rows), project=adapter.project),
        num_heads=config.num_heads,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=pre_norm,
        causal=causal,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
    run = partial(run_blocks, config, block)
    return stack(config, rows, task, run, width=width, embed=embed, features=features, packs=packs, first=first)


def stack(
    config: Any,
    rows: table.Table,
    task: Task,
    run: Callable[[Base, Adapters, Hidden, Array | None], Hidden],
    *,
    width: int,
    embed: Callable[[Any, Base, Batch, Array | None], Hidden],
    features: Callable[[Any, Base, Hidden], Features],
    packs: bool,
    first: Sequence[str] = (),
) -> Model:
    """Layers of any kind with the head of a task on top: `run` is `Model.layers`, all else is as in `transformer`."""
    return Model(
        init=lambda key: table.init(rows, key, config.num_layers, config.compute_dtype, first),
        init_head=lambda key: task.head(key, width, config.pooling != "last"),
        embed=partial(embed, config),
        layers=run,
        task=lambda base, adapters, hidden, key: task.read(adapters.head, features(config, base, hidden)),
        sites=table.sites(rows),
        num_layers=config.num_layers,
        packs=packs,
        axes=table.axes(rows),
    )


def run_blocks(config: Any, block: Block, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
    """The stack applied in order: `Model.layers`.

    Args:
      config: Shape, of which `remat`, `unroll` and `activation_dtype` are read.
      block: one layer.
      base: frozen weights, of which `layers` has leaves `[L, ...]`.
      adapters: effective ones, leaves `[L, ...]`.
      hidden: input.
      key: drives dropout; None turns it off.
    """
    stacked = base["layers"]
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    keys = None if key is None else jax.random.split(jax.random.fold_in(key, 1), num_layers)

    def step(x: Array, layer: tuple) -> tuple[Any, None]:
        weights, leaves, layer_key = layer
        return block(weights, x, hidden, leaves, layer_key), None

    step = jax.checkpoint(step) if config.remat else step
    values = hidden.values.astype(config.activation_dtype)
    xs = jax.tree.map(pack, stacked), adapters.modules, keys
    values, _ = lax.scan(step, values, xs, unroll=config.unroll)
    return hidden._replace(values=values.astype(jnp.float32))


def words(table: Array, batch: Batch) -> Array:
    """`[G, P, d]` float32 of the tokens, by a table that may be in bfloat16: what is gathered alone is converted."""
    return unpack(pack(table)[batch["input_ids"]]).astype(jnp.float32)


def places_of(batch: Batch) -> Places | None:
    """Where the positions of a packed batch lie; None of a batch that is not."""
    if "example_ids" not in batch:
        return None
    return Places(batch["example_ids"], batch["position_ids"], batch["first_places"])


def positions(batch: Batch, max_positions: int) -> Array:
    """`[P]` or `[G, P]`: which of its example's positions each place holds.

    Raises:
      ValueError: there are more than `max_positions`.
    """
    places = places_of(batch)
    if places is not None:
        return places.position
    length = batch["input_ids"].shape[1]
    check_length(max_positions, length)
    return jnp.arange(length)


def logits(hidden: Hidden, words: Array) -> Logits:
    """Logits of the next token by a table of words, `[V, d]`."""
    return Logits(hidden.values, words, _by_words)


def _by_words(values: Array, words: Array) -> Array:
    return project(values, words.T)


def check_length(max_positions: int, max_length: int) -> None:
    """Raise ValueError for a sequence that is longer than a model's table of positions."""
    if max_length > max_positions:
        raise ValueError(f"data.max_length must be at most {max_positions}, the model's positions, got {max_length}")


def normed(hidden: Hidden, weights: Mapping[str, Array], eps: float) -> Hidden:
    """Hidden after the norm that a model ends in."""
    return hidden._replace(values=layer_norm(hidden.values, (weights["scale"], weights["bias"]), eps))


def pool(hidden: Hidden, pooling: str) -> Array:
    """`[B, d]`: the mean over real positions (`mean`), the first (`cls`) or the last of them (`last`)."""
    if hidden.places is not None:
        return _pool_packed(hidden.values, hidden.mask, hidden.places, pooling)
    real = hidden.mask > 0
    if pooling == "mean":
        count = jnp.maximum(hidden.mask.sum(1, keepdims=True), 1)
        return (hidden.values * hidden.mask[:, :, None]).sum(1) / count
    place = jnp.argmax(real, axis=1) if pooling == "cls" else real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden.values, place[:, None, None], axis=1)[:, 0]


def _pool_packed(values: Array, mask: Array, places: Places, pooling: str) -> Array:
    """`pool` of rows that examples share; zeros (`mean`) for an example that has no position."""
    values = values.reshape(-1, values.shape[-1])
    if pooling == "cls":
        return values[places.first]
    of_example = jnp.arange(places.first.shape[0])[:, None] == places.example.ravel()
    taken = of_example * mask.ravel()
    if pooling == "last":
        return values[places.first + jnp.maximum(taken.sum(1).astype(jnp.int32) - 1, 0)]
    finite = jnp.all(jnp.isfinite(values), -1)
    total = jnp.matmul(taken, jnp.where(finite[:, None], values, 0), precision=lax.Precision.HIGHEST)
    # One example that is not finite would else be so for all, since 0 times NaN is NaN.
    own = jnp.where(jnp.any((taken > 0) & ~finite, 1, keepdims=True), jnp.nan, 1.0)
    return own * total / jnp.maximum(taken.sum(1, keepdims=True), 1)
