"""Decoders of the first Gemma (arXiv 2403.08295).

They are Llama's with words that are scaled, scales of norms that are held less 1, and tied logits.
"""

from collections.abc import Mapping
from typing import Any

from fedjax_lora.models import llama
from fedjax_lora.models.family import read_shape, refuse
from fedjax_lora.models.llama import LlamaConfig
from fedjax_lora.models.rope import read_rope

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Of Hugging Face, where they are not Llama's."""


def shape(fields: Mapping[str, Any], **ours: Any) -> LlamaConfig:
    """LlamaConfig from the fields of a Gemma's `config.json` and our own options.

    Raises:
      ValueError: for a variant that the decoder does not compute; names the field as `config.json` does.
    """
    refuse(fields, {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)})
    fields = DEFAULTS | dict(fields)
    if fields["hidden_act"] == "gelu":  # the official files say so, and mean the other
        fields["hidden_act"] = "gelu_pytorch_tanh"
    names = llama.NAMES | llama.ATTENTION_BIAS
    own = {"rope": read_rope(fields), "scaled_words": True, "norms_from_one": True}
    return read_shape(LlamaConfig, fields, names, **own, **ours)


FAMILY = llama.FAMILY._replace(title="Gemma", shape=shape, classes=llama.classes("Gemma"))
