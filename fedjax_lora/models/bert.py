"""Encoders of the BERT family (Devlin et al., arXiv 1810.04805), MiniLM and BERT checkpoints included.

Adapters may sit on `query`, `key`, `value`, `output` (attention.output.dense), `up` (intermediate.dense) and `down`
(output.dense).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Features, Hidden, Model, Task
from fedjax_lora.core.types import Base, Batch
from fedjax_lora.models import layers, table
from fedjax_lora.models.family import Family, TextShape, read_shape, refuse, sequence_classes, token_class
from fedjax_lora.models.table import Part
from fedjax_lora.ops.primitives import layer_norm, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TextShape):
    """Shape of a BERT encoder; the defaults are those of Hugging Face.

    num_types: kinds of token, such as those of the first and of the second sentence.
    pooler: whether the checkpoint has a pretrained tanh layer, through which `cls` pooling passes.
    """

    num_types: int = 2
    pooler: bool = False

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
    return layers.transformer(
        config,
        weights(config),
        task,
        adapter,
        width=config.width,
        embed=embed,
        features=features,
        pre_norm=False,
        packs=True,
        first=[f"embeddings/{name}" for name in ("word", "position", "type")],
    )


def embed(config: TextShape, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words, positions and, where the model has them, types, normalised."""
    return embed_at(config, base, batch, layers.positions(batch, config.max_positions), key)


def embed_at(config: TextShape, base: Base, batch: Batch, position: Array, key: Array | None) -> Hidden:
    """`embed` with the rows of the table of positions, `[P]` or `[G, P]`, that the places take."""
    ids, tables, places = batch["input_ids"], base["embeddings"], layers.places_of(batch)
    values = tables["word"][ids]
    if "type" in tables:
        values += tables["type"][batch.get("token_type_ids", jnp.zeros_like(ids))]
    values += tables["position"][position]
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
