"""Decoders of the Qwen family: Qwen2 (arXiv 2407.10671), 2.5 included, and Qwen3 (arXiv 2505.09388).

They are Llama's with a bias of queries, keys and values (Qwen2), or with both normalised in each head (Qwen3).
"""

from collections.abc import Mapping
from typing import Any

from fedjax_lora.models import llama
from fedjax_lora.models.family import read_shape, refuse
from fedjax_lora.models.llama import LlamaConfig
from fedjax_lora.models.rope import read_rope

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Of Hugging Face, where they are not Llama's."""


def qwen2_shape(fields: Mapping[str, Any], **ours: Any) -> LlamaConfig:
    """LlamaConfig from the fields of a Qwen2's `config.json` and our own options.

    Raises:
      ValueError: for a variant that the decoder does not compute; names the field as `config.json` does.
    """
    _refuse_windows(fields)
    fields = DEFAULTS | dict(fields)
    return read_shape(LlamaConfig, fields, llama.NAMES, rope=read_rope(fields), qkv_bias=True, **ours)


def qwen3_shape(fields: Mapping[str, Any], **ours: Any) -> LlamaConfig:
    """The same of a Qwen3."""
    _refuse_windows(fields)
    fields = DEFAULTS | {"head_dim": 128} | dict(fields)
    names = llama.NAMES | llama.ATTENTION_BIAS
    return read_shape(LlamaConfig, fields, names, rope=read_rope(fields), head_norms=True, **ours)


def _refuse_windows(fields: Mapping[str, Any]) -> None:
    refuse(fields, {"use_sliding_window": (False,)})
    kinds = fields.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else (kinds,):
        refuse({"layer_types": kind}, {"layer_types": ("full_attention",)})


QWEN2 = llama.FAMILY._replace(title="Qwen2", shape=qwen2_shape, classes=llama.classes("Qwen2"))
QWEN3 = llama.FAMILY._replace(title="Qwen3", shape=qwen3_shape, classes=llama.classes("Qwen3"))
