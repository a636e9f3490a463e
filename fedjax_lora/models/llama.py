"""Decoders of the Llama family (Touvron et al., arXiv 2302.13971), Llama 2 and 3 and Mistral included.

Adapters may sit on `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj`. Other families are
this one with another `shape`, see `qwen` and `gemma`.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Features, Hidden, Model, Task
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.models import layers, table
from fedjax_lora.models.family import (
    Family,
    HeadClass,
    Shape,
    next_token_class,
    read_shape,
    refuse,
    sequence_classes,
    token_class,
)
from fedjax_lora.models.rope import Rope, read_rope, rotation
from fedjax_lora.models.table import AS_IS, Part, Row, Stored
from fedjax_lora.ops.primitives import attention, gated, rms_norm, rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(Shape):
    """Shape of a decoder; the defaults are those of Hugging Face.

    num_kv_heads: heads of keys and values; they divide `num_heads`, which None stands for.
    head_dim: of a head, even; None is the width by the heads.
    rope: how positions turn queries and keys.
    qkv_bias, output_bias, mlp_bias: whether these projections have a bias.
    head_norms: whether queries and keys are normalised in each head.
    tied: whether the table of words gives the logits.
    lm_head: whether there is a table for the logits; a tied model does not use it.
    scaled_words: whether words are scaled by the root of the width.
    norms_from_one: whether the checkpoint holds the scales of norms less 1.
    """

    vocab_size: int = 32000
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int = 11008
    max_positions: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    tied: bool = False
    lm_head: bool = False
    scaled_words: bool = False
    norms_from_one: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.kv_heads}")
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width = {self.width} without head_dim, got {self.num_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, got {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Elements of a head, D."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim


NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Field of the shape -> its name in `config.json`."""

ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}


def shape(fields: Mapping[str, Any], **ours: Any) -> LlamaConfig:
    """LlamaConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant that this decoder does not compute; names the field as `config.json` does.
    """
    refuse(fields, {"pretraining_tp": (1,)})
    names = NAMES | ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}
    return read_shape(LlamaConfig, fields, names, rope=read_rope(fields), **ours)


def mistral_shape(fields: Mapping[str, Any], **ours: Any) -> LlamaConfig:
    """The same of a Mistral model: attention to all earlier positions alone."""
    defaults = {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 2**17,
        "sliding_window": 4096,
    }
    fields = defaults | dict(fields)
    refuse(fields, {"sliding_window": ()})
    return read_shape(LlamaConfig, fields, NAMES, rope=read_rope(fields), **ours)


FROM_ONE = Stored(lambda tensor: tensor + 1, lambda leaf: leaf - 1)


def weights(config: LlamaConfig) -> table.Table:
    """All frozen weights; the names are those of Hugging Face's LlamaModel, and of `lm_head` beside it."""
    d, layer = config.width, "layers.{layer}"
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    roles = ("query",), ("key",), ("value",)
    qkv = [
        Part(site, f"{layer}.self_attn.{site}", n_out, role)
        for (site, n_out), role in zip(widths.items(), roles, strict=True)
    ]
    output = [Part("o_proj", f"{layer}.self_attn.o_proj", d, ("output",))]
    gate_up = [
        Part(site, f"{layer}.mlp.{site}", config.mlp_width, role)
        for site, role in (("gate_proj", ()), ("up_proj", ("up",)))
    ]
    down = [Part("down_proj", f"{layer}.mlp.down_proj", d, ("down",))]
    words = table.embedding("embed_tokens", config.vocab_size, d, "vocab", matrix=True)

    def norm(source: str, n: int = d, axis: str | None = "embed") -> Row:
        stored = FROM_ONE if config.norms_from_one else AS_IS
        return Row((n,), (axis,), table.ones, (f"{source}.weight",), stored)

    rows = {
        "embeddings/word": words,
        "layers/norm_attention/scale": norm(f"{layer}.input_layernorm"),
        **table.dense("layers/query_key_value", d, qkv, ("embed", "heads"), bias=config.qkv_bias),
        **table.dense("layers/output", queries, output, ("heads", "embed"), bias=config.output_bias),
        "layers/norm_mlp/scale": norm(f"{layer}.post_attention_layernorm"),
        **table.dense("layers/gate_up", d, gate_up, ("embed", "mlp"), bias=config.mlp_bias),
        **table.dense("layers/down", config.mlp_width, down, ("mlp", "embed"), bias=config.mlp_bias),
        "norm/scale": norm("norm"),
    }
    if config.head_norms:
        rows["layers/norm_query/scale"] = norm(f"{layer}.self_attn.q_norm", config.head_width, None)
        rows["layers/norm_key/scale"] = norm(f"{layer}.self_attn.k_norm", config.head_width, None)
    if config.lm_head and not config.tied:
        rows["lm_head"] = words._replace(names=("lm_head.weight",), prefixed=False)
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderBlock:
    """A `layers.Block` that is also told how positions turn: attention and a gated perceptron, in residual branches.

    config: shape of the decoder. dense: its projections `query_key_value`, `output`, `gate_up` and `down`.
    """

    config: LlamaConfig
    dense: layers.Dense

    def __call__(
        self,
        weights: Mapping[str, Any],
        x: Array,
        around: Hidden,
        adapters: Mapping[str, Any],
        key: Array | None,
        *,
        rotation: tuple[Array, Array],
    ) -> Array:
        """See `layers.Block`; `rotation` as `models.rope` gives it."""
        config, dtype = self.config, self.config.compute_dtype
        keys = (None, None) if key is None else jax.random.split(key)

        y = self._norm(weights["norm_attention"], x)
        y = self.dense("query_key_value", weights, y, adapters)
        y = self._turned(weights, y, rotation)
        example = None if around.places is None else around.places.example
        kv_heads = config.kv_heads
        y = attention(y, around.mask, config.num_heads, dtype, example, num_kv_heads=kv_heads, causal=True)
        y = self.dense("output", weights, y, adapters)
        x = x + layers.dropout(y, config.dropout, keys[0], around.places)

        y = self._norm(weights["norm_mlp"], x)
        y = self.dense("gate_up", weights, y, adapters)
        y = gated(y, lambda gate: layers.ACTIVATIONS[config.activation](gate, dtype), dtype)
        y = self.dense("down", weights, y, adapters)
        return x + layers.dropout(y, config.dropout, keys[1], around.places)

    def _turned(self, weights: Mapping[str, Any], qkv: Array, rotation: tuple[Array, Array]) -> Array:
        """`[G, P, (H + 2 * K) * D]` with queries and keys normalised, where the model does, and turned."""
        heads = qkv.reshape(*qkv.shape[:2], -1, self.config.head_width)
        num_heads, num_kv = self.config.num_heads, self.config.kv_heads
        query, key, value = jnp.split(heads, (num_heads, num_heads + num_kv), axis=2)
        if self.config.head_norms:
            query, key = self._norm(weights["norm_query"], query), self._norm(weights["norm_key"], key)
        heads = jnp.concatenate([rotary(query, rotation), rotary(key, rotation), value], axis=2)
        return heads.reshape(qkv.shape)

    def _norm(self, weights: Mapping[str, Array], x: Array) -> Array:
        return rms_norm(x, weights["scale"], self.config.norm_eps, self.config.compute_dtype)


def decoder(config: LlamaConfig, task: Task, adapter: Adapter) -> Model:
    """A decoder with the head of a task on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`, or both of them packed, see `data.packing`.

    Args:
      config: shape of the decoder.
      task: what is read of the positions, by the trained head or the model's own table of words.
      adapter: what is trained beside the frozen matrices.
    """
    rows = weights(config)
    block = DecoderBlock(config=config, dense=layers.Dense(sites=table.sites(rows), project=adapter.project))
    return layers.stack(
        config, rows, task, partial(run, block), width=config.width, embed=embed, features=features, packs=True
    )


def embed(config: LlamaConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words alone: positions enter in each layer."""
    ids, places = batch["input_ids"], layers.places_of(batch)
    if places is None:
        layers.check_length(config.max_positions, ids.shape[1])
    values = layers.words(base["embeddings"]["word"], batch)
    values = values * math.sqrt(config.width) if config.scaled_words else values
    values = layers.dropout(values, config.dropout, None if key is None else jax.random.fold_in(key, 0), places)
    return Hidden(values=values, mask=batch["attention_mask"].astype(jnp.float32), places=places)


def run(block: DecoderBlock, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
    """`Model.layers`: all layers turn positions alike."""
    config = block.config
    position = jnp.arange(hidden.values.shape[1]) if hidden.places is None else hidden.places.position
    turned = partial(block, rotation=rotation(config.rope, config.head_width, position))
    return layers.run_blocks(config, turned, base, adapters, hidden, key)


def features(config: LlamaConfig, base: Base, hidden: Hidden) -> Features:
    """What a task reads: the normalised positions, and logits where the model has a table for them."""
    hidden = hidden._replace(values=rms_norm(hidden.values, base["norm"]["scale"], config.norm_eps))
    words = base["embeddings"]["word"] if config.tied else base.get("lm_head")
    logits = None if words is None else layers.logits(hidden, words)
    return Features(hidden, lambda: layers.pool(hidden, config.pooling), logits)


def classes(name: str) -> dict[str, HeadClass]:
    """Task -> class of transformers, for models whose classes begin with this name."""
    of_text = sequence_classes(
        f"{name}ForSequenceClassification", "score", "model.", lambda shape: shape.pooling == "last"
    )
    of_tokens = token_class(f"{name}ForTokenClassification", "score", "model.")
    return of_text | of_tokens | next_token_class(f"{name}ForCausalLM", "model.")


FAMILY = Family(
    title="Llama",
    shape=shape,
    make=decoder,
    weights=weights,
    prefixes=("", "model."),
    ignored=("layers.*.self_attn.rotary_emb.inv_freq",),  # of checkpoints before transformers 4.32
    held={"lm_head": "lm_head.weight"},
    logits=("lm_head",),
    classes=classes("Llama"),
)
MISTRAL = FAMILY._replace(title="Mistral", shape=mistral_shape, classes=classes("Mistral"))
