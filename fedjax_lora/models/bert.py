"""Encoders of the BERT family (Devlin et al., arXiv 1810.04805), MiniLM and BERT checkpoints included.

Adapters may sit on `query`, `key`, `value`, `output` (attention.output.dense), `up` (intermediate.dense) and `down`
(output.dense).
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
from fedjax_lora.models.family import Family, Shape, read_shape, refuse, sequence_classes, token_class
from fedjax_lora.models.table import Part
from fedjax_lora.ops.primitives import layer_norm, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(Shape):
    """Shape of a BERT encoder; the defaults are those of Hugging Face.

    pooler: whether the checkpoint has a pretrained tanh layer, through which `cls` pooling passes.
    """

    vocab_size: int = 30522
    width: int = 768
    mlp_width: int = 3072
    max_positions: int = 512
    num_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooler: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width = {self.width}, got {self.num_heads}")

    @property
    def uses_pooler(self) -> bool:
        """Whether the pooled position passes through the pretrained layer."""
        return self.pooler and self.pooling == "cls"


NAMES = {
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
"""Field of the shape -> its name in `config.json`."""


def shape(fields: Mapping[str, Any], **ours: Any) -> BertConfig:
    """BertConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant of BERT that this encoder does not compute; names the field as `config.json` does.
    """
    refuse(fields, {"position_embedding_type": ("absolute",), "is_decoder": (False,)})
    return read_shape(BertConfig, fields, NAMES, **ours)


def weights(config: BertConfig) -> table.Table:
    """All frozen weights; the names are those of Hugging Face's BertModel."""
    d, layer = config.width, "encoder.layer.{layer}"
    self_attention = [Part(site, f"{layer}.attention.self.{site}", d) for site in ("query", "key", "value")]
    rows = {
        "embeddings/word": table.embedding("embeddings.word_embeddings", config.vocab_size, d, "vocab"),
        "embeddings/position": table.embedding("embeddings.position_embeddings", config.max_positions, d, "position"),
        "embeddings/type": table.embedding("embeddings.token_type_embeddings", config.num_types, d, None),
        **table.norm("embeddings/norm", "embeddings.LayerNorm", d),
        **table.dense("layers/query_key_value", d, self_attention, ("embed", "heads")),
        **table.dense("layers/output", d, [Part("output", f"{layer}.attention.output.dense", d)], ("heads", "embed")),
        **table.norm("layers/norm_attention", f"{layer}.attention.output.LayerNorm", d),
        **table.dense("layers/up", d, [Part("up", f"{layer}.intermediate.dense", config.mlp_width)], ("embed", "mlp")),
        **table.dense("layers/down", config.mlp_width, [Part("down", f"{layer}.output.dense", d)], ("mlp", "embed")),
        **table.norm("layers/norm_mlp", f"{layer}.output.LayerNorm", d),
    }
    if config.uses_pooler:
        rows |= table.dense("pooler", d, [Part("", "pooler.dense", d)], ("embed", None), init=table.normal(0.02))
    return rows


def bert(config: BertConfig, task: Task, adapter: Adapter) -> Model:
    """A BERT encoder with the head of a task on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`, and `token_type_ids: [B, S]` where the types
    are not all 0; or all of them packed, see `data.packing`.

    Args:
      config: shape of the encoder.
      task: what is read of the positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    rows = weights(config)
    sites = table.sites(rows)
    block = layers.TransformerBlock(
        dense=layers.Dense(sites=sites, project=adapter.project),
        num_heads=config.num_heads,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=False,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
    return Model(
        init=partial(init, config),
        init_head=lambda key: task.head(key, config.width, config.pooling != "last"),
        embed=partial(embed, config),
        layers=partial(layers.run_blocks, block, remat=config.remat),
        task=lambda base, adapters, hidden, key: task.read(adapters.head, features(config, base, hidden)),
        sites=sites,
        num_layers=config.num_layers,
        packs=True,
    )


def init(config: BertConfig, key: Array) -> Base:
    """Random frozen weights."""
    first = [f"embeddings/{name}" for name in ("word", "position", "type")]
    return table.init(weights(config), key, config.num_layers, config.compute_dtype, first)


def embed(config: BertConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words, positions and types, normalised."""
    ids, tables, places = batch["input_ids"], base["embeddings"], layers.places_of(batch)
    if places is None:
        layers.check_length(config.max_positions, ids.shape[1])
    positions = tables["position"][: ids.shape[1]] if places is None else tables["position"][places.position]
    types = batch["token_type_ids"] if "token_type_ids" in batch else jnp.zeros_like(ids)
    values = tables["word"][ids] + tables["type"][types] + positions
    values = layer_norm(values, (tables["norm"]["scale"], tables["norm"]["bias"]), config.norm_eps)
    values = layers.dropout(values, config.dropout, None if key is None else jax.random.fold_in(key, 0), places)
    return Hidden(values=values, mask=batch["attention_mask"].astype(jnp.float32), places=places)


def features(config: BertConfig, base: Base, hidden: Hidden) -> Features:
    """What a task reads: pooled is through the pretrained pooler where the model has one."""

    def pooled() -> Array:
        values = layers.pool(hidden, config.pooling)
        return jnp.tanh(project(values, base["pooler"]["w"]) + base["pooler"]["b"]) if config.uses_pooler else values

    return Features(hidden, pooled)


FAMILY = Family(
    title="BERT",
    shape=shape,
    make=bert,
    weights=weights,
    prefixes=("", "bert."),
    ignored=("embeddings.position_ids", "pooler.*"),
    # Of checkpoints that were converted from TensorFlow, bert-base-uncased among them.
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    held={"pooler": "pooler.dense.weight"},
    classes=sequence_classes("BertForSequenceClassification", "classifier", "bert.", lambda shape: shape.uses_pooler)
    | token_class("BertForTokenClassification", "classifier", "bert."),
)
