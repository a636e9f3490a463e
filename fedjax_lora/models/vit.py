"""Vision transformers (ViT, Dosovitskiy et al., arXiv 2010.11929; DeiT, Touvron et al., arXiv 2012.12877).

Adapters may sit on `query`, `key`, `value`, `output` (of attention), `up` and `down` (of the perceptron).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Features, Hidden, Model, Task
from fedjax_lora.core.types import Base, Batch
from fedjax_lora.models import layers, table
from fedjax_lora.models.family import Family, Shape, image_class, read_shape, refuse
from fedjax_lora.models.table import Part, Row, Stored
from fedjax_lora.ops.primitives import project


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(Shape):
    """Shape of a vision transformer; the defaults are `vit-tiny` on 8x8 gray digits.

    height, width, channels: of an image.
    patch: side of the square patches; it divides height and width.
    hidden: model width d.
    qkv_bias: whether queries, keys and values have a bias.
    always_cls: whether a learned position lies before the patches whatever the pooling; else with `cls` alone, which
      reads it.
    distillation: whether one more lies after it, as in DeiT.
    mean, std: of each channel, by which images are normalised; () for images that are taken as they are.
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
    qkv_bias: bool = True
    always_cls: bool = False
    distillation: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"image sides must be multiples of {self.patch}, got {self.height} x {self.width}")
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden = {self.hidden}, got {self.num_heads}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, self.channels):
                raise ValueError(f"{name} must be of {self.channels} channels, got {getattr(self, name)}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See Shape."""
        return self.height, self.width, self.channels

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned positions before the patches."""
        return ("cls",) * (self.always_cls or self.pooling == "cls") + ("distillation",) * self.distillation

    @property
    def positions(self) -> int:
        """Learned ones and patches."""
        return len(self.learned) + (self.height // self.patch) * (self.width // self.patch)


def tiny(image_shape: tuple[int, int, int], **options) -> VitConfig:
    """`vit-tiny` for images of `(height, width, channels)`."""
    height, width, channels = image_shape
    return VitConfig(height=height, width=width, channels=channels, **options)


NAMES = {
    "height": "image_size",
    "width": "image_size",
    "channels": "num_channels",
    "patch": "patch_size",
    "hidden": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
    "mean": "image_mean",
    "std": "image_std",
}
"""Field of the shape -> its name in `config.json` or, of the last two, in `preprocessor_config.json`."""

_BASE = {
    "image_size": 224,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
}
"""What Hugging Face takes where `config.json` says nothing."""


def shape(fields: Mapping[str, Any], *, distillation: bool = False, **ours: Any) -> VitConfig:
    """VitConfig from the fields of a Hugging Face `config.json` and our own options.

    Args:
      fields: of the file.
      distillation: whether it is of DeiT.
      **ours: our own options.

    Raises:
      ValueError: for a variant that is not computed; names the field as `config.json` does.
    """
    refuse(fields, {"qkv_bias": (True, False)})
    fields = _BASE | dict(fields)
    height, width = _sides(fields, "image_size")
    patch, other = _sides(fields, "patch_size")
    if patch != other:
        raise ValueError(f"patch_size must be of squares, got {fields['patch_size']}")
    rest = {name: value for name, value in fields.items() if name not in ("image_size", "patch_size")}
    for name in ("image_mean", "image_std"):
        rest[name] = tuple(fields.get(name) or ()) if fields.get("do_normalize") else ()
    sides = {"height": height, "width": width, "patch": patch}
    return read_shape(VitConfig, rest, NAMES, **sides, always_cls=True, distillation=distillation, **ours)


def _sides(fields: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Height and width, of which one number stands for both."""
    value = fields[name]
    if not isinstance(value, list):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a height and a width, got {value!r}")
    return value[0], value[1]


def weights(config: VitConfig) -> table.Table:
    """All weights; the names are those of Hugging Face's ViTModel and DeiTModel."""
    d, mlp_width, layer = config.hidden, config.mlp_width, "layers.{layer}"
    qkv = [Part(site, f"{layer}.attention.{site[0]}_proj", d) for site in ("query", "key", "value")]
    patch_size = config.patch**2 * config.channels
    patch, patch_init = [Part("", "embeddings.patch_embeddings.projection", d)], table.normal(patch_size**-0.5)
    drawn, position = table.normal(0.02), ("embeddings.position_embeddings",)
    learned = {
        f"embeddings/{name}": Row((d,), ("embed",), drawn, (f"embeddings.{name}_token",), _LEARNED)
        for name in config.learned
    }
    return {
        **table.dense(
            "embeddings/patch", patch_size, patch, (None, "embed"), stored=_convolution(config), init=patch_init
        ),
        "embeddings/position": Row((config.positions, d), ("position", "embed"), drawn, position, _POSITION),
        **table.dense("layers/query_key_value", d, qkv, ("embed", "heads"), bias=config.qkv_bias),
        **table.dense("layers/output", d, [Part("output", f"{layer}.attention.o_proj", d)], ("heads", "embed")),
        **table.norm("layers/norm_attention", f"{layer}.layernorm_before", d),
        **table.dense("layers/up", d, [Part("up", f"{layer}.mlp.fc1", mlp_width)], ("embed", "mlp")),
        **table.dense("layers/down", mlp_width, [Part("down", f"{layer}.mlp.fc2", d)], ("mlp", "embed")),
        **table.norm("layers/norm_mlp", f"{layer}.layernorm_after", d),
        **table.norm("norm", "layernorm", d),
        **learned,
    }


_LEARNED = Stored(lambda tensor: tensor[0, 0], lambda leaf: leaf[None, None])
_POSITION = Stored(lambda tensor: tensor[0], lambda leaf: leaf[None])


def _convolution(config: VitConfig) -> Stored:
    """`[d, channels, patch, patch]`, of which our rows are `patch * patch * channels`."""
    sides = config.patch, config.patch, config.channels
    return Stored(
        lambda tensor: tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0]),
        lambda leaf: leaf.reshape(*sides, -1).transpose(3, 2, 0, 1),
    )


def vit(config: VitConfig, task: Task, adapter: Adapter) -> Model:
    """A vision transformer with the head of a task on top.

    A batch holds `image: [B, height, width, channels]` float32, in [0, 1] for a model that normalises images.

    Args:
      config: shape of the transformer.
      task: what is read of the positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    return layers.transformer(
        config,
        weights(config),
        task,
        adapter,
        width=config.hidden,
        embed=embed,
        features=features,
        pre_norm=True,
        first=[f"embeddings/{name}" for name in ("patch/w", "position", "cls")],
    )


def embed(config: VitConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """The learned positions and the patches, row by row, with what stands for their place."""
    image, weights = batch["image"], base["embeddings"]
    if image.shape[1:] != config.image_shape:
        raise ValueError(f"image must be [B, {config.height}, {config.width}, {config.channels}], got {image.shape}")
    if config.mean:
        image = (image - jnp.array(config.mean)) / jnp.array(config.std)
    values = project(_patches(config, image), weights["patch"]["w"]) + weights["patch"]["b"]
    learned = [jnp.broadcast_to(weights[name], (len(image), 1, config.hidden)) for name in config.learned]
    values = jnp.concatenate([*learned, values], axis=1)
    embed_key = None if key is None else jax.random.fold_in(key, 0)
    values = layers.dropout(values + weights["position"], config.dropout, embed_key)
    return Hidden(values=values, mask=jnp.ones(values.shape[:2]))


def features(config: VitConfig, base: Base, hidden: Hidden) -> Features:
    """What a task reads: the normalised positions."""
    hidden = layers.normed(hidden, base["norm"], config.norm_eps)
    return Features(hidden, lambda: layers.pool(hidden, config.pooling))


def _patches(config: VitConfig, image: Array) -> Array:
    """`[B, patches, patch * patch * channels]`."""
    patch, rows, columns = config.patch, config.height // config.patch, config.width // config.patch
    grid = image.reshape(-1, rows, patch, columns, patch, config.channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, patch * patch * config.channels)


FAMILY = Family(
    title="ViT",
    shape=shape,
    make=vit,
    weights=weights,
    prefixes=("", "vit."),
    ignored=("embeddings.mask_token", "pooler.*"),
    renamed={  # the last is a part of the fifth
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    },
    classes=image_class("ViTForImageClassification", "vit."),
)
"""Checkpoints have the older names; today's are those of PyTorch's modules, by which PEFT knows them."""

DEIT = FAMILY._replace(
    title="DeiT",
    shape=partial(shape, distillation=True),
    prefixes=("", "deit."),
    classes=image_class("DeiTForImageClassification", "deit."),
)
