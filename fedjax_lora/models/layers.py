"""Blocks that the models share: a projection with adapters, attention, and one transformer block.

A block is written for one layer. A model stacks the weights of its layers to `[L, ...]` and scans the block over
them, so that neither the program nor its compile time grows with depth.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fedjax_lora.core.methods import Hidden
from fedjax_lora.core.types import Factors
from fedjax_lora.models.primitives import attention, gelu, layer_norm, pack, project

ACTIVATIONS: dict[str, Callable[[Array, str], Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x, dtype: jax.nn.gelu(x),
    "gelu_pytorch_tanh": lambda x, dtype: jax.nn.gelu(x),
    "relu": lambda x, dtype: jax.nn.relu(x),
}
"""Activations by the name that Hugging Face gives them: `(x, dtype of what the backward pass keeps)`."""


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """`x` with elements zeroed at `rate` and the rest scaled up; `x` itself without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class Dense(nn.Module):
    """Projections of one input, side by side in one frozen matrix, each with an adapter or none.

    widths: module name -> n_out.
    dtype: of the frozen matrix and of its product.
    """

    widths: Mapping[str, int]
    dtype: str

    @nn.compact
    def __call__(self, x: Array, adapters: Mapping[str, Factors]) -> Array:
        """`[B, S, n_in] -> [B, S, sum of widths]`."""
        n_out = sum(self.widths.values())
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], n_out), self.dtype)
        b = self.param("b", nn.initializers.zeros, (n_out,))
        return project(x, w, self._side_by_side(adapters)) + b

    def _side_by_side(self, adapters: Mapping[str, Factors]) -> Factors | None:
        """One pair of factors for all the modules: each b is padded to the columns of its own."""
        n_out, start, parts = sum(self.widths.values()), 0, []
        for name, width in self.widths.items():
            if name in adapters:
                a, b = adapters[name].a, adapters[name].b
                parts.append(Factors(a=a, b=jnp.pad(b, ((0, 0), (start, n_out - start - width)))))
            start += width
        if not parts:
            return None
        return Factors(a=jnp.concatenate([p.a for p in parts], 1), b=jnp.concatenate([p.b for p in parts], 0))


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

    num_heads: attention heads; they divide the width.
    mlp_width: width between the perceptron's two layers.
    activation: name in ACTIVATIONS.
    norm_eps: of the layer normalisations.
    pre_norm: whether a branch normalises its input (ViT) or its sum with the residual stream (BERT).
    dropout: rate on the output of each branch.
    dtype: of the frozen matrices, their products, and what the backward pass keeps.
    """

    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    pre_norm: bool
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, adapters: Mapping[str, Factors], key: Array | None) -> Array:
        """`[B, S, d] -> [B, S, d]`."""
        d = x.shape[-1]
        keys = (None, None) if key is None else jax.random.split(key)
        norm_attention = LayerNorm(self.norm_eps, self.dtype, name="norm_attention")
        norm_mlp = LayerNorm(self.norm_eps, self.dtype, name="norm_mlp")

        y = norm_attention(x) if self.pre_norm else x
        qkv = Dense({"query": d, "key": d, "value": d}, self.dtype, name="query_key_value")(y, adapters)
        y = attention(qkv, mask, self.num_heads, self.dtype)
        y = Dense({"output": d}, self.dtype, name="output")(y, adapters)
        x = x + dropout(y, self.dropout, keys[0])
        x = x if self.pre_norm else norm_attention(x)

        y = norm_mlp(x) if self.pre_norm else x
        y = Dense({"up": self.mlp_width}, self.dtype, name="up")(y, adapters)
        y = ACTIVATIONS[self.activation](y, self.dtype)
        y = Dense({"down": d}, self.dtype, name="down")(y, adapters)
        x = x + dropout(y, self.dropout, keys[1])
        return x if self.pre_norm else norm_mlp(x)


def block_targets(d: int, mlp_width: int) -> dict[str, tuple[int, int]]:
    """`Model.targets` of a stack of blocks: query, key, value, output (of attention), up and down (of the MLP)."""
    square = dict.fromkeys(("query", "key", "value", "output"), (d, d))
    return square | {"up": (d, mlp_width), "down": (mlp_width, d)}


def init_blocks(block: Block, key: Array, num_layers: int, d: int) -> dict:
    """Random weights of a stack, leaves `[L, ...]`."""
    x, mask = jnp.zeros((1, 1, d)), jnp.ones((1, 1))
    keys = jax.random.split(key, num_layers)
    return jax.vmap(lambda layer_key: dict(block.init(layer_key, x, mask, {}, None)["params"]))(keys)


def run_blocks(
    block: Block, layers: Mapping, modules: Mapping[str, Factors], hidden: Hidden, key: Array | None
) -> Hidden:
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
        return block.apply({"params": weights}, x, hidden.mask, factors, layer_key), None

    values, _ = jax.lax.scan(step, hidden.values, (jax.tree.map(pack, layers), modules, keys))
    return hidden._replace(values=values)


def pool(hidden: Hidden, pooling: str) -> Array:
    """`[B, d]`: the mean over real positions (`mean`) or the first position (`cls`)."""
    if pooling == "cls":
        return hidden.values[:, 0]
    count = jnp.maximum(hidden.mask.sum(1, keepdims=True), 1)
    return (hidden.values * hidden.mask[:, :, None]).sum(1) / count


def init_head(key: Array, d: int, num_classes: int) -> dict[str, Array]:
    """A classifier's fresh `{"w": [d, classes], "b": [classes]}`."""
    return {"w": 0.02 * jax.random.normal(key, (d, num_classes)), "b": jnp.zeros(num_classes)}
