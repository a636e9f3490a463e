"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) for small images; each branch normalises its input.

Adapters may sit on `query`, `key`, `value`, `output` (of attention), `up` and `down` (of the perceptron).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.base import Adapters, Base, Batch, Hidden, Model
from fedjax_lora.models import layers
from fedjax_lora.models.primitives import layer_norm, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Shape of a vision transformer; the defaults are `vit-tiny` on 8x8 gray digits.

    height, width, channels: of an image.
    patch: side of the square patches; it divides height and width.
    hidden: model width d.
    dropout: rate after the embeddings and on the output of each residual branch.
    compute_dtype: of the frozen matrices and their products.
    """

    height: int = 8
    width: int = 8
    channels: int = 1
    patch: int = 4
    hidden: int = 64
    num_layers: int = 4
    num_heads: int = 4
    mlp_width: int = 256
    pooling: Literal["mean", "cls"] = "mean"
    dropout: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"image sides must be multiples of {self.patch}, got {self.height} x {self.width}")
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden = {self.hidden}, got {self.num_heads}")


def tiny(image_shape: tuple[int, int, int], **options) -> VitConfig:
    """`vit-tiny` for images of `(height, width, channels)`."""
    height, width, channels = image_shape
    return VitConfig(height=height, width=width, channels=channels, **options)


def vit(config: VitConfig, num_classes: int) -> Model:
    """A vision transformer with a linear classifier on top.

    A batch holds `image: [B, height, width, channels]` float32 in [0, 1].

    Args:
      config: shape of the transformer.
      num_classes: of the classifier, which is the trained head.
    """
    d, patch = config.hidden, config.patch
    rows, columns = config.height // patch, config.width // patch
    patch_size = patch * patch * config.channels
    block = layers.Block(
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=True,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
    has_cls = config.pooling == "cls"

    def init(key: Array) -> Base:
        patch_key, position_key, cls_key, layers_key = jax.random.split(key, 4)
        w = jax.random.normal(patch_key, (patch_size, d)) * patch_size**-0.5
        base = {
            "embeddings": {
                "patch": {"w": w.astype(config.compute_dtype), "b": jnp.zeros(d)},
                "position": 0.02 * jax.random.normal(position_key, (rows * columns + has_cls, d)),
            },
            "layers": layers.init_blocks(block, layers_key, config.num_layers, d),
            "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
        }
        if has_cls:
            base["embeddings"]["cls"] = 0.02 * jax.random.normal(cls_key, (d,))
        return base

    def embed(base: Base, batch: Batch, key: Array | None) -> Hidden:
        image, weights = batch["image"], base["embeddings"]
        if image.shape[1:] != (config.height, config.width, config.channels):
            raise ValueError(
                f"image must be [B, {config.height}, {config.width}, {config.channels}], got {image.shape}"
            )
        patches = image.reshape(-1, rows, patch, columns, patch, config.channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, patch_size)
        values = project(patches, weights["patch"]["w"]) + weights["patch"]["b"]
        if has_cls:
            first = jnp.broadcast_to(weights["cls"], (values.shape[0], 1, d))
            values = jnp.concatenate([first, values], axis=1)
        embed_key = None if key is None else jax.random.fold_in(key, 0)
        values = layers.dropout(values + weights["position"], config.dropout, embed_key)
        return Hidden(values=values, mask=jnp.ones(values.shape[:2]))

    def run(base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
        layers_key = None if key is None else jax.random.fold_in(key, 1)
        hidden = layers.run_blocks(block, base["layers"], adapters.modules, hidden, layers_key)
        norm = base["norm"]
        return hidden._replace(values=layer_norm(hidden.values, (norm["scale"], norm["bias"]), block.norm_eps))

    def task(base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Array:
        return layers.pool(hidden, config.pooling) @ adapters.head["w"] + adapters.head["b"]

    return Model(
        init=init,
        init_head=lambda key: layers.init_head(key, d, num_classes),
        embed=embed,
        layers=run,
        task=task,
        targets=layers.block_targets(d, config.mlp_width),
        num_layers=config.num_layers,
    )
