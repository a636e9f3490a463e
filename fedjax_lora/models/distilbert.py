"""DistilBERT (Sanh et al., arXiv 1910.01108): BERT without types of tokens and without a pooler, by other names.

Adapters may sit where BERT's do: `query` (q_lin), `key` (k_lin), `value` (v_lin), `output` (out_lin), `up` (lin1) and
`down` (lin2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedjax_lora.core.learning import Adapter, Features, Hidden, Model, Task
from fedjax_lora.core.types import Base
from fedjax_lora.models import bert, layers, table
from fedjax_lora.models.family import Family, TextShape, read_shape, token_class
from fedjax_lora.models.table import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(TextShape):
    """Shape of a DistilBERT encoder; the defaults are those of Hugging Face."""

    num_layers: int = 6


NAMES = {
    "vocab_size": "vocab_size",
    "width": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "mlp_width": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "activation": "activation",
}
"""Field of the shape -> its name in `config.json`. Sinusoidal positions are in the checkpoint like learned ones."""


def shape(fields: Mapping[str, Any], **ours: Any) -> DistilBertConfig:
    """DistilBertConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for what this encoder does not compute; names the field as `config.json` does.
    """
    return read_shape(DistilBertConfig, fields, NAMES, **ours)


def weights(config: DistilBertConfig) -> table.Table:
    """All frozen weights; the names are those of Hugging Face's DistilBertModel."""
    d, mlp_width, layer = config.width, config.mlp_width, "transformer.layer.{layer}"
    qkv = [Part(site, f"{layer}.attention.{site[0]}_lin", d) for site in ("query", "key", "value")]
    return {
        "embeddings/word": table.embedding("embeddings.word_embeddings", config.vocab_size, d, "vocab"),
        "embeddings/position": table.embedding("embeddings.position_embeddings", config.max_positions, d, "position"),
        **table.norm("embeddings/norm", "embeddings.LayerNorm", d),
        **table.dense("layers/query_key_value", d, qkv, ("embed", "heads")),
        **table.dense("layers/output", d, [Part("output", f"{layer}.attention.out_lin", d)], ("heads", "embed")),
        **table.norm("layers/norm_attention", f"{layer}.sa_layer_norm", d),
        **table.dense("layers/up", d, [Part("up", f"{layer}.ffn.lin1", mlp_width)], ("embed", "mlp")),
        **table.dense("layers/down", mlp_width, [Part("down", f"{layer}.ffn.lin2", d)], ("mlp", "embed")),
        **table.norm("layers/norm_mlp", f"{layer}.output_layer_norm", d),
    }


def distilbert(config: DistilBertConfig, task: Task, adapter: Adapter) -> Model:
    """A DistilBERT encoder with the head of a task on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`; or both packed, see `data.packing`.

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
        embed=bert.embed,
        features=features,
        pre_norm=False,
        packs=True,
    )


def features(config: DistilBertConfig, base: Base, hidden: Hidden) -> Features:
    """What a task reads."""
    del base
    return Features(hidden, lambda: layers.pool(hidden, config.pooling))


FAMILY = Family(
    title="DistilBERT",
    shape=shape,
    make=distilbert,
    weights=weights,
    prefixes=("", "distilbert."),
    ignored=("embeddings.position_ids",),
    renamed=bert.FAMILY.renamed,
    classes=token_class("DistilBertForTokenClassification", "classifier", "distilbert."),
)
