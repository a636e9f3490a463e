"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) for small images; each branch normalises its input.

Adapters may sit on `query`, `key`, `value`, `output` (of attention), `up` and `down` (of the perceptron).
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Hidden, Model, Site, Task
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.models import layers
from fedjax_lora.ops.primitives import layer_norm, project

NORM_EPS = 1e-6


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


def sites(config: VitConfig) -> dict[str, Site]:
    """Where adapters may sit."""
    return layers.block_sites(config.hidden, config.mlp_width)


def vit(config: VitConfig, task: Task, adapter: Adapter) -> Model:
    """A vision transformer with the head of a task on top.

    A batch holds `image: [B, height, width, channels]` float32 in [0, 1].

    Args:
      config: shape of the transformer.
      task: what is read of the pooled positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    block = _block(config, adapter.project)
    return Model(
        init=partial(init, config),
        init_head=lambda key: task.head(key, config.hidden),
        embed=partial(embed, config),
        layers=partial(encode, block),
        task=lambda base, adapters, hidden, key: task.read(adapters.head, pooled(config, base, hidden)),
        sites=sites(config),
        num_layers=config.num_layers,
    )


def init(config: VitConfig, key: Array) -> Base:
    """Random weights."""
    patch_key, position_key, cls_key, layers_key = jax.random.split(key, 4)
    d, patch_size = config.hidden, config.patch**2 * config.channels
    num_positions = (config.height // config.patch) * (config.width // config.patch) + (config.pooling == "cls")
    w = jax.random.normal(patch_key, (patch_size, d)) * patch_size**-0.5
    base = {
        "embeddings": {
            "patch": {"w": w.astype(config.compute_dtype), "b": jnp.zeros(d)},
            "position": 0.02 * jax.random.normal(position_key, (num_positions, d)),
        },
        "layers": layers.init_blocks(_block(config), layers_key, config.num_layers, d),
        "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
    }
    if config.pooling == "cls":
        base["embeddings"]["cls"] = 0.02 * jax.random.normal(cls_key, (d,))
    return base


def embed(config: VitConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Patches, row by row, and positions."""
    image, weights = batch["image"], base["embeddings"]
    if image.shape[1:] != (config.height, config.width, config.channels):
        raise ValueError(f"image must be [B, {config.height}, {config.width}, {config.channels}], got {image.shape}")
    values = project(_patches(config, image), weights["patch"]["w"]) + weights["patch"]["b"]
    if config.pooling == "cls":
        first = jnp.broadcast_to(weights["cls"], (values.shape[0], 1, config.hidden))
        values = jnp.concatenate([first, values], axis=1)
    embed_key = None if key is None else jax.random.fold_in(key, 0)
    values = layers.dropout(values + weights["position"], config.dropout, embed_key)
    return Hidden(values=values, mask=jnp.ones(values.shape[:2]))


def encode(block: layers.Block, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
    """All blocks."""
    layers_key = None if key is None else jax.random.fold_in(key, 1)
    return layers.run_blocks(block, base["layers"], adapters.modules, hidden, layers_key)


def pooled(config: VitConfig, base: Base, hidden: Hidden) -> Array:
    """`[B, d]`: the normalised positions, pooled."""
    norm = base["norm"]
    values = layer_norm(hidden.values, (norm["scale"], norm["bias"]), NORM_EPS)
    return layers.pool(hidden._replace(values=values), config.pooling)


def _patches(config: VitConfig, image: Array) -> Array:
    """`[B, patches, patch * patch * channels]`."""
    patch, rows, columns = config.patch, config.height // config.patch, config.width // config.patch
    grid = image.reshape(-1, rows, patch, columns, patch, config.channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, patch * patch * config.channels)


def _block(config: VitConfig, project: layers.Project = layers.without_adapters) -> layers.Block:
    return layers.Block(
        sites=sites(config),
        project=project,
        num_heads=config.num_heads,
        activation="gelu",
        norm_eps=NORM_EPS,
        pre_norm=True,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
