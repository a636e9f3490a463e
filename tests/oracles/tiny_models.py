"""Small random models of Hugging Face, one of each family, and what ours of the same folder computes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from fedjax_lora.core.learning import Features, Task
from fedjax_lora.core.types import Adapters
from fedjax_lora.models import load
from oracles.model_context import model_context

WIDTH, MLP, LAYERS, HEADS, VOCABULARY, POSITIONS = 24, 40, 2, 3, 31, 16

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 34,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "sliding_window": None,
}
_IMAGES = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": [4, 6],
    "patch_size": 2,
    "num_channels": 3,
}

CONFIGS: Mapping[str, Any] = {
    "bert": transformers.BertConfig(**_ENCODER),
    "roberta": transformers.RobertaConfig(**_ENCODER, type_vocab_size=1, layer_norm_eps=1e-5),
    "xlm-roberta": transformers.XLMRobertaConfig(**_ENCODER, pad_token_id=3, hidden_act="relu"),
    "camembert": transformers.CamembertConfig(**_ENCODER, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=MLP, n_layers=LAYERS, n_heads=HEADS,
        max_position_embeddings=POSITIONS, sinusoidal_pos_embds=True,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=MLP, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "vit": transformers.ViTConfig(**_IMAGES, num_labels=5),
    "deit": transformers.DeiTConfig(**_IMAGES, qkv_bias=False, hidden_act="gelu_new", num_labels=5),
    "llama": transformers.LlamaConfig(**_DECODER),
    "mistral": transformers.MistralConfig(**_DECODER),
    "qwen2": transformers.Qwen2Config(**_DECODER),
    "qwen3": transformers.Qwen3Config(**_DECODER, tie_word_embeddings=True),
    "gemma": transformers.GemmaConfig(**_DECODER),
}  # fmt: skip
"""By `model_type`."""


def save(folder, model):
    """Write a model whose every parameter is random: norms and biases are not at their start."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def text_batch(padding=0):
    """Sentences of several lengths, with `padding` after them, and in the middle of one."""
    ids, lengths = np.random.default_rng(0).integers(4, VOCABULARY, (3, 10)), np.array([10, 4, 7])[:, None]
    real = np.arange(10) < lengths
    ids = np.where(real, ids, padding)
    ids[0, 3] = padding
    return {"input_ids": ids, "attention_mask": real.astype(np.int64)}


def everything() -> Task:
    """A task whose outputs are all that a model offers."""

    def read(head: Mapping[str, Any], features: Features) -> Any:
        logits = () if features.logits is None else features.logits()
        return {"hidden": features.hidden.values, "pooled": features.pooled(), "logits": logits}

    context = model_context(2)
    return context.made["task"]._replace(read=read, learns="next_token")


def outputs(folder, batch, image_shape=None, **options) -> dict[str, Any]:
    """What our model of a folder computes of a batch: see `everything`."""
    context = model_context(2, image_shape)
    made = {**context.made, "task": everything()}
    config = load.ModelConfig(pretrained=str(folder), **options)
    model, base = load.build_model(config, context._replace(made=made))
    batch = {name: jnp.asarray(leaf) for name, leaf in batch.items()}
    return jax.jit(model.apply)(base, Adapters(modules={}, head={}), batch)
