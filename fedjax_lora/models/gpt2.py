"""GPT-2 (Radford et al., 2019): a decoder whose every branch normalises its input, with the logits of the next token.

Adapters may sit where PEFT puts them: `c_attn` (queries, keys and values together), `attn.c_proj`, `c_fc` and
`mlp.c_proj`.
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
from fedjax_lora.models.family import (
    Family,
    TextShape,
    next_token_class,
    read_shape,
    refuse,
    sequence_classes,
    token_class,
)
from fedjax_lora.models.table import AS_IS, Part, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(TextShape):
    """Shape of a GPT-2 decoder; the defaults are those of Hugging Face."""

    vocab_size: int = 50257
    max_positions: int = 1024
    activation: str = "gelu_new"
    norm_eps: float = 1e-5


NAMES = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "mlp_width": "n_inner",
    "max_positions": "n_positions",
    "activation": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}
"""Field of the shape -> its name in `config.json`."""

_COMPUTED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def shape(fields: Mapping[str, Any], **ours: Any) -> Gpt2Config:
    """Gpt2Config from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant that this decoder does not compute; names the field as `config.json` does.
    """
    refuse(fields, _COMPUTED)
    inner = fields.get("n_inner")
    config = read_shape(Gpt2Config, {**fields, "n_inner": 1 if inner is None else inner}, NAMES, **ours)
    return dataclasses.replace(config, mlp_width=4 * config.width) if inner is None else config


def weights(config: Gpt2Config) -> table.Table:
    """All frozen weights; the names are those of Hugging Face's GPT2Model, whose matrices are stored as ours."""
    d, layer = config.width, "h.{layer}"

    def matrix(path: str, n_in: int, part: Part, axes: tuple[str, str]) -> dict[str, Row]:
        part = part._replace(source=f"{layer}.{part.source}")
        return table.dense(f"layers/{path}", n_in, [part], axes, stored=AS_IS)

    qkv = Part("c_attn", "attn.c_attn", 3 * d, ("query", "key", "value"))

    return {
        "embeddings/word": table.embedding("wte", config.vocab_size, d, "vocab", matrix=True),
        "embeddings/position": table.embedding("wpe", config.max_positions, d, "position"),
        **table.norm("layers/norm_attention", f"{layer}.ln_1", d),
        **matrix("query_key_value", d, qkv, ("embed", "heads")),
        **matrix("output", d, Part("attn.c_proj", "attn.c_proj", d, ("output",)), ("heads", "embed")),
        **table.norm("layers/norm_mlp", f"{layer}.ln_2", d),
        **matrix("up", d, Part("c_fc", "mlp.c_fc", config.mlp_width, ("up",)), ("embed", "mlp")),
        **matrix("down", config.mlp_width, Part("mlp.c_proj", "mlp.c_proj", d, ("down",)), ("mlp", "embed")),
        **table.norm("norm", "ln_f", d),
    }


def gpt2(config: Gpt2Config, task: Task, adapter: Adapter) -> Model:
    """A GPT-2 decoder with the head of a task on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`; or both packed, see `data.packing`.

    Args:
      config: shape of the decoder.
      task: what is read of the positions, by the trained head or as logits of the next token.
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
        pre_norm=True,
        causal=True,
        packs=True,
    )


def embed(config: Gpt2Config, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words and positions."""
    tables, places = base["embeddings"], layers.places_of(batch)
    position = tables["position"][layers.positions(batch, config.max_positions)]
    values = layers.words(tables["word"], batch) + position
    values = layers.dropout(values, config.dropout, None if key is None else jax.random.fold_in(key, 0), places)
    return Hidden(values=values, mask=batch["attention_mask"].astype(jnp.float32), places=places)


def features(config: Gpt2Config, base: Base, hidden: Hidden) -> Features:
    """What a task reads: the normalised positions, and logits by the table of words."""
    hidden = layers.normed(hidden, base["norm"], config.norm_eps)
    return Features(
        hidden,
        pooled=lambda: layers.pool(hidden, config.pooling),
        logits=layers.logits(hidden, base["embeddings"]["word"]),
    )


FAMILY = Family(
    title="GPT-2",
    shape=shape,
    make=gpt2,
    weights=weights,
    prefixes=("", "transformer."),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    classes=sequence_classes(
        "GPT2ForSequenceClassification", "score", "transformer.", lambda shape: shape.pooling == "last"
    )
    | token_class("GPT2ForTokenClassification", "classifier", "transformer.")
    | next_token_class("GPT2LMHeadModel", "transformer."),
)
