"""Blocks that the models share: a projection with adapters, attention, and one transformer block.

A block is written for one layer. A model stacks the weights of its layers to `[L, ...]` and scans the block over
them, so that neither the program nor its compile time grows with depth.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from fedjax_lora.core.learning import Hidden, Places, Site
from fedjax_lora.ops.primitives import attention, gelu, layer_norm, pack, project

ACTIVATIONS: dict[str, Callable[[Array, str], Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x, dtype: jax.nn.gelu(x),
    "gelu_pytorch_tanh": lambda x, dtype: jax.nn.gelu(x),
    "relu": lambda x, dtype: jax.nn.relu(x),
}
"""Activations by the name that Hugging Face gives them: `(x, dtype of what the backward pass keeps)`."""


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


Project = Callable[[Array, Array, Mapping[str, tuple[int, Any]]], Array]
"""`Adapter.project`."""


def without_adapters(x: Array, w: Array, adapters: Mapping[str, tuple[int, Any]]) -> Array:
    """The frozen projection `x @ w` alone, for weights that are only shaped or drawn.

    Raises:
      ValueError: there are adapters.
    """
    if adapters:
        raise ValueError(f"a model that is made without an adapter must have none, got {', '.join(adapters)}")
    return project(x, w)


class Dense(nn.Module):
    """Projections of one input, side by side in one frozen matrix, each with an adapter or none.

    columns: of all of them.
    dtype: of the frozen matrix and of its product.
    project: of the adapter.
    """

    columns: int
    dtype: str
    project: Project

    @nn.compact
    def __call__(self, x: Array, adapters: Mapping[str, tuple[int, Any]]) -> Array:
        """`[B, S, n_in] -> [B, S, columns]`; `adapters`: module name -> first column, effective leaves."""
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], self.columns), self.dtype)
        b = self.param("b", nn.initializers.zeros, (self.columns,))
        return self.project(x, w, adapters) + b


class LayerNorm(nn.Module):
    """Layer normalisation in float32; what its backward pass keeps is in `dtype`."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d] -> [..., d]`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, (scale, bias), self.eps, self.dtype)


class Block(nn.Module):
    """One transformer layer: self-attention and a two-layer perceptron, each in a residual branch.

    sites: of the model, which state the columns of each matrix, see `block_sites`.
    project: of the adapter.
    num_heads: attention heads; they divide the width.
    activation: name in ACTIVATIONS.
    norm_eps: of the layer normalisations.
    pre_norm: whether a branch normalises its input (ViT) or its sum with the residual stream (BERT).
    dropout: rate on the output of each branch.
    dtype: of the frozen matrices, their products, and what the backward pass keeps.
    """

    sites: Mapping[str, Site]
    project: Project
    num_heads: int
    activation: str
    norm_eps: float
    pre_norm: bool
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, places: Places | None, adapters: Mapping[str, Any], key: Array | None
    ) -> Array:
        """`[G, P, d] -> [G, P, d]`."""
        keys = (None, None) if key is None else jax.random.split(key)
        norm_attention = LayerNorm(self.norm_eps, self.dtype, name="norm_attention")
        norm_mlp = LayerNorm(self.norm_eps, self.dtype, name="norm_mlp")

        y = norm_attention(x) if self.pre_norm else x
        qkv = self._dense("query_key_value", y, adapters)
        y = attention(qkv, mask, self.num_heads, self.dtype, None if places is None else places.example)
        y = self._dense("output", y, adapters)
        x = x + dropout(y, self.dropout, keys[0], places)
        x = x if self.pre_norm else norm_attention(x)

        y = norm_mlp(x) if self.pre_norm else x
        y = self._dense("up", y, adapters)
        y = ACTIVATIONS[self.activation](y, self.dtype)
        y = self._dense("down", y, adapters)
        x = x + dropout(y, self.dropout, keys[1], places)
        return x if self.pre_norm else norm_mlp(x)

    def _dense(self, group: str, x: Array, adapters: Mapping[str, Any]) -> Array:
        """One frozen matrix with the adapters of its sites."""
        sites = {name: site for name, site in self.sites.items() if site.group == group}
        columns = max(site.first + site.n_out for site in sites.values())
        own = {name: (site.first, adapters[name]) for name, site in sites.items() if name in adapters}
        return Dense(columns, self.dtype, self.project, name=group)(x, own)


def block_sites(d: int, mlp_width: int, sources: Mapping[str, str] | None = None) -> dict[str, Site]:
    """`Model.sites` of a stack of blocks: query, key, value, output (of attention), up and down (of the perceptron).

    Args:
      d: model width.
      mlp_width: width between the perceptron's two layers.
      sources: `Site.source` by name; None where there is no checkpoint.
    """
    table = {
        "query": Site("query_key_value", 0, d, d),
        "key": Site("query_key_value", d, d, d),
        "value": Site("query_key_value", 2 * d, d, d),
        "output": Site("output", 0, d, d),
        "up": Site("up", 0, d, mlp_width),
        "down": Site("down", 0, mlp_width, d),
    }
    return {name: site._replace(source=(sources or {}).get(name, "")) for name, site in table.items()}


def init_blocks(block: Block, key: Array, num_layers: int, d: int) -> dict:
    """Random weights of a stack, leaves `[L, ...]`."""
    x, mask = jnp.zeros((1, 1, d)), jnp.ones((1, 1))
    keys = jax.random.split(key, num_layers)
    return jax.vmap(lambda layer_key: dict(block.init(layer_key, x, mask, None, {}, None)["params"]))(keys)


def run_blocks(block: Block, layers: Mapping, modules: Mapping[str, Any], hidden: Hidden, key: Array | None) -> Hidden:
    """The stack applied in order.

    Args:
      block: one layer.
      layers: its frozen weights, leaves `[L, ...]`.
      modules: effective adapters, leaves `[L, ...]`.
      hidden: input.
      key: drives dropout; None turns it off.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, num_layers)

    def step(x: Array, layer: tuple) -> tuple[Any, None]:
        weights, factors, layer_key = layer
        return block.apply({"params": weights}, x, hidden.mask, hidden.places, factors, layer_key), None

    values, _ = lax.scan(step, hidden.values, (jax.tree.map(pack, layers), modules, keys))
    return hidden._replace(values=values)


def pool(hidden: Hidden, pooling: str) -> Array:
    """`[B, d]`: the mean over real positions (`mean`) or the first of them (`cls`)."""
    if hidden.places is not None:
        return _pool_packed(hidden.values, hidden.mask, hidden.places, pooling)
    if pooling == "cls":
        first = jnp.argmax(hidden.mask > 0, axis=1)
        return jnp.take_along_axis(hidden.values, first[:, None, None], axis=1)[:, 0]
    count = jnp.maximum(hidden.mask.sum(1, keepdims=True), 1)
    return (hidden.values * hidden.mask[:, :, None]).sum(1) / count


def _pool_packed(values: Array, mask: Array, places: Places, pooling: str) -> Array:
    """`pool` of rows that examples share; zeros (`mean`) for an example that has no position."""
    values = values.reshape(-1, values.shape[-1])
    if pooling == "cls":
        return values[places.first]
    of_example = jnp.arange(places.first.shape[0])[:, None] == places.example.ravel()
    taken = of_example * mask.ravel()
    finite = jnp.all(jnp.isfinite(values), -1)
    total = jnp.matmul(taken, jnp.where(finite[:, None], values, 0), precision=lax.Precision.HIGHEST)
    # One example that is not finite would else be so for all, since 0 times NaN is NaN.
    own = jnp.where(jnp.any((taken > 0) & ~finite, 1, keepdims=True), jnp.nan, 1.0)
    return own * total / jnp.maximum(taken.sum(1, keepdims=True), 1)
