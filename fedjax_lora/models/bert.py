"""BERT-family encoder classifier (Devlin et al., arXiv 1810.04805), MiniLM and BERT checkpoints included.

Adapters may sit on the modules of MODULE_NAMES: `query`, `key`, `value`, `output` (attention.output.dense), `up`
(intermediate.dense) and `down` (output.dense).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Hidden, Model
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.models import layers
from fedjax_lora.models.primitives import layer_norm, project
from fedjax_lora.models.safetensors import Weight

MODULE_NAMES = {
    "query": "encoder.layer.{layer}.attention.self.query",
    "key": "encoder.layer.{layer}.attention.self.key",
    "value": "encoder.layer.{layer}.attention.self.value",
    "output": "encoder.layer.{layer}.attention.output.dense",
    "up": "encoder.layer.{layer}.intermediate.dense",
    "down": "encoder.layer.{layer}.output.dense",
}
"""Modules that may carry an adapter -> their names in a Hugging Face BertModel."""


def _dense(path: str, *names: str) -> dict[str, Weight]:
    return {
        f"{path}/w": Weight(tuple(f"{name}.weight" for name in names), transpose=True),
        f"{path}/b": Weight(tuple(f"{name}.bias" for name in names)),
    }


def _norm(path: str, name: str) -> dict[str, Weight]:
    return {f"{path}/scale": Weight((f"{name}.weight",)), f"{path}/bias": Weight((f"{name}.bias",))}


WEIGHT_MAP: dict[str, Weight] = {
    "embeddings/word": Weight(("embeddings.word_embeddings.weight",)),
    "embeddings/position": Weight(("embeddings.position_embeddings.weight",)),
    "embeddings/type": Weight(("embeddings.token_type_embeddings.weight",)),
    **_norm("embeddings/norm", "embeddings.LayerNorm"),
    **_dense("layers/query_key_value", MODULE_NAMES["query"], MODULE_NAMES["key"], MODULE_NAMES["value"]),
    **_dense("layers/output", MODULE_NAMES["output"]),
    **_norm("layers/norm_attention", "encoder.layer.{layer}.attention.output.LayerNorm"),
    **_dense("layers/up", MODULE_NAMES["up"]),
    **_dense("layers/down", MODULE_NAMES["down"]),
    **_norm("layers/norm_mlp", "encoder.layer.{layer}.output.LayerNorm"),
    **_dense("pooler", "pooler.dense"),
}
"""Where each frozen weight lies in a Hugging Face checkpoint."""

RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Endings of checkpoints that were converted from TensorFlow, bert-base-uncased among them -> today's."""

PREFIXES = ("", "bert.")
"""What may stand before the names: nothing (BertModel) or `bert.` (a model with a head)."""

IGNORED = ("embeddings.position_ids", "pooler.*")
"""Tensors that an encoder may hold and the model does not need."""

POOLER = "pooler.dense.weight"
"""A checkpoint that holds it has a pretrained pooler."""


_MOST, _MOST_LAYERS = 2**24, 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape of a BERT encoder; the defaults are those of Hugging Face.

    pooler: whether `cls` pooling passes through the pretrained tanh layer.
    dropout: rate after the embeddings and on the output of each residual branch.
    compute_dtype: of the frozen matrices and their products.
    """

    vocab_size: int = 30522
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    num_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooling: Literal["mean", "cls"] = "mean"
    pooler: bool = False
    dropout: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "max_positions", "num_types"):
            value, most = getattr(self, name), _MOST_LAYERS if name == "num_layers" else _MOST
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width = {self.width}, got {self.num_heads}")
        if not isinstance(self.activation, str) or self.activation not in layers.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(layers.ACTIVATIONS)}, got {self.activation!r}")
        if type(self.norm_eps) is not float or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number above 0 and below 1, got {self.norm_eps!r}")


def read_config(fields: Mapping[str, Any], **ours: Any) -> BertConfig:
    """BertConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant of BERT that this encoder does not compute; names the field as `config.json` does.
    """
    if (kind := fields.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    if (decodes := fields.get("is_decoder")) not in (None, False):
        raise ValueError(f"is_decoder must be false, got {decodes!r}")
    names = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "num_types": "type_vocab_size",
        "activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
    }
    try:
        return BertConfig(**{name: fields[theirs] for name, theirs in names.items() if theirs in fields}, **ours)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise ValueError(f"{names.get(name, name)} {problem}") from None


def weight_map(config: BertConfig) -> dict[str, Weight]:
    """The entries of WEIGHT_MAP that the model needs."""
    return {path: weight for path, weight in WEIGHT_MAP.items() if config.pooler or not path.startswith("pooler/")}


def bert(config: BertConfig, num_classes: int) -> Model:
    """A BERT encoder with a linear classifier on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`, and `token_type_ids: [B, S]` where the types
    are not all 0.

    Args:
      config: shape of the encoder.
      num_classes: of the classifier, which is the trained head.
    """
    return Model(
        init=partial(init, config),
        init_head=lambda key: layers.init_head(key, config.width, num_classes),
        embed=partial(embed, config),
        layers=partial(encode, config),
        task=partial(classify, config),
        targets=layers.block_targets(config.width, config.mlp_width),
        num_layers=config.num_layers,
    )


def init(config: BertConfig, key: Array) -> Base:
    """Random frozen weights."""
    word_key, position_key, type_key, layers_key, pooler_key = jax.random.split(key, 5)
    d = config.width

    def table(table_key: Array, rows: int) -> Array:
        return 0.02 * jax.random.normal(table_key, (rows, d))

    base = {
        "embeddings": {
            "word": table(word_key, config.vocab_size),
            "position": table(position_key, config.max_positions),
            "type": table(type_key, config.num_types),
            "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
        },
        "layers": layers.init_blocks(_block(config), layers_key, config.num_layers, d),
    }
    if config.pooler:
        base["pooler"] = {"w": table(pooler_key, d).astype(config.compute_dtype), "b": jnp.zeros(d)}
    return base


def embed(config: BertConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words, positions and types, normalised."""
    ids, tables = batch["input_ids"], base["embeddings"]
    check_length(config, ids.shape[1])
    types = batch["token_type_ids"] if "token_type_ids" in batch else jnp.zeros_like(ids)
    values = tables["word"][ids] + tables["type"][types] + tables["position"][: ids.shape[1]]
    values = layer_norm(values, (tables["norm"]["scale"], tables["norm"]["bias"]), config.norm_eps)
    values = layers.dropout(values, config.dropout, None if key is None else jax.random.fold_in(key, 0))
    return Hidden(values=values, mask=batch["attention_mask"].astype(jnp.float32))


def check_length(config: BertConfig, max_length: int) -> None:
    """Raise ValueError for a sequence that is longer than the model's table of positions."""
    if max_length > config.max_positions:
        raise ValueError(
            f"data.max_length must be at most {config.max_positions}, the model's positions, got {max_length}"
        )


def encode(config: BertConfig, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
    """All blocks."""
    layers_key = None if key is None else jax.random.fold_in(key, 1)
    return layers.run_blocks(_block(config), base["layers"], adapters.modules, hidden, layers_key)


def classify(config: BertConfig, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Array:
    """`[B, classes]` logits of the pooled positions."""
    del key
    pooled = layers.pool(hidden, config.pooling)
    if config.pooler:
        pooled = jnp.tanh(project(pooled, base["pooler"]["w"]) + base["pooler"]["b"])
    return pooled @ adapters.head["w"] + adapters.head["b"]


def _block(config: BertConfig) -> layers.Block:
    return layers.Block(
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=False,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
