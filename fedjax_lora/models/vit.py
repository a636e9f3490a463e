"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929); each branch normalises its input.

Adapters may sit on `query`, `key`, `value`, `output` (of attention), `up` and `down` (of the perceptron).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Features, Hidden, Model, Task
from fedjax_lora.core.types import Base, Batch
from fedjax_lora.models import layers, table
from fedjax_lora.models.family import Shape
from fedjax_lora.models.table import Part, Row
from fedjax_lora.ops.primitives import layer_norm, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(Shape):
    """Shape of a vision transformer; the defaults are `vit-tiny` on 8x8 gray digits.

    height, width, channels: of an image.
    patch: side of the square patches; it divides height and width.
    hidden: model width d.
    """

    height: int = 8
    width: int = 8
    channels: int = 1
    patch: int = 4
    hidden: int = 64
    num_layers: int = 4
    num_heads: int = 4
    mlp_width: int = 256
    activation: str = "gelu"
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"image sides must be multiples of {self.patch}, got {self.height} x {self.width}")
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden = {self.hidden}, got {self.num_heads}")

    @property
    def positions(self) -> int:
        """Patches, and the one that `cls` pooling reads."""
        return (self.height // self.patch) * (self.width // self.patch) + (self.pooling == "cls")


def tiny(image_shape: tuple[int, int, int], **options) -> VitConfig:
    """`vit-tiny` for images of `(height, width, channels)`."""
    height, width, channels = image_shape
    return VitConfig(height=height, width=width, channels=channels, **options)


def weights(config: VitConfig) -> table.Table:
    """All weights; the names of the layers' are those of Hugging Face's ViTModel."""
    d, patch_size, layer = config.hidden, config.patch**2 * config.channels, "encoder.layer.{layer}"
    self_attention = [Part(site, f"{layer}.attention.attention.{site}", d) for site in ("query", "key", "value")]
    patch = [Part("", "embeddings.patch_embeddings.projection", d)]
    rows = {
        **table.dense("embeddings/patch", patch_size, patch, (None, "embed"), init=table.normal(patch_size**-0.5)),
        "embeddings/position": Row((config.positions, d), ("position", "embed"), table.normal(0.02)),
        **table.dense("layers/query_key_value", d, self_attention, ("embed", "heads")),
        **table.dense("layers/output", d, [Part("output", f"{layer}.attention.output.dense", d)], ("heads", "embed")),
        **table.norm("layers/norm_attention", f"{layer}.layernorm_before", d),
        **table.dense("layers/up", d, [Part("up", f"{layer}.intermediate.dense", config.mlp_width)], ("embed", "mlp")),
        **table.dense("layers/down", config.mlp_width, [Part("down", f"{layer}.output.dense", d)], ("mlp", "embed")),
        **table.norm("layers/norm_mlp", f"{layer}.layernorm_after", d),
        **table.norm("norm", "layernorm", d),
    }
    if config.pooling == "cls":
        rows["embeddings/cls"] = Row((d,), ("embed",), table.normal(0.02))
    return rows


def vit(config: VitConfig, task: Task, adapter: Adapter) -> Model:
    """A vision transformer with the head of a task on top.

    A batch holds `image: [B, height, width, channels]` float32 in [0, 1].

    Args:
      config: shape of the transformer.
      task: what is read of the positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    sites = table.sites(weights(config))
    block = layers.TransformerBlock(
        dense=layers.Dense(sites=sites, project=adapter.project),
        num_heads=config.num_heads,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=True,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
    return Model(
        init=partial(init, config),
        init_head=lambda key: task.head(key, config.hidden, config.pooling != "last"),
        embed=partial(embed, config),
        layers=partial(layers.run_blocks, block, remat=config.remat),
        task=lambda base, adapters, hidden, key: task.read(adapters.head, features(config, base, hidden)),
        sites=sites,
        num_layers=config.num_layers,
    )


def init(config: VitConfig, key: Array) -> Base:
    """Random weights."""
    first = [f"embeddings/{name}" for name in ("patch/w", "position", "cls")]
    return table.init(weights(config), key, config.num_layers, config.compute_dtype, first)


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


def features(config: VitConfig, base: Base, hidden: Hidden) -> Features:
    """What a task reads: the normalised positions."""
    norm = base["norm"]
    hidden = hidden._replace(values=layer_norm(hidden.values, (norm["scale"], norm["bias"]), config.norm_eps))
    return Features(hidden, lambda: layers.pool(hidden, config.pooling))


def _patches(config: VitConfig, image: Array) -> Array:
    """`[B, patches, patch * patch * channels]`."""
    patch, rows, columns = config.patch, config.height // config.patch, config.width // config.patch
    grid = image.reshape(-1, rows, patch, columns, patch, config.channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, patch * patch * config.channels)
