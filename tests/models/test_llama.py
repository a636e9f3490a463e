"""Decoders of the Llama family, against PyTorch, against PEFT, and against themselves."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora
from fedjax_lora.core.learning import Features
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import llama, load
from fedjax_lora.models.families import FAMILIES
from fedjax_lora.training import split
from oracles.model_context import model_context

torch = pytest.importorskip("torch")

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 34,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
"""Three heads of queries share one of keys and values, and are narrower together than the model."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None}

VARIANTS = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", FOUR_HEADS | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma": ("Gemma", {"attention_bias": True}),
}
"""Name -> the class of transformers and what differs from SHAPE."""

RANK, ALPHA = 3, 6.0
LENGTHS = np.array([10, 4, 7])
BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 31, (3, 10)) * (np.arange(10) < LENGTHS[:, None]),
    "attention_mask": (np.arange(10) < LENGTHS[:, None]).astype(np.int64),
    "label": np.array([0, 1, 1]),
}
REAL = BATCH["attention_mask"] > 0


def reference(variant, head="ForCausalLM"):
    """A model of transformers whose biases and norms are not the 0 and 1 that they start from."""
    family, more = VARIANTS[variant]
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**SHAPE | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def build(folder, **options):
    return load.build_model(load.ModelConfig(pretrained=str(folder), **options), model_context(2))


def found_features(folder, **options):
    """Values and logits `[B, S, ...]` of a folder."""
    config = load.ModelConfig(pretrained=str(folder), **options)
    found = load.read_pretrained(config, str(folder))
    made = model_context(2).made

    def read(head, features):
        return features.hidden.values, None if features.logits is None else features.logits()

    model = found.family.make(found.shape, made["task"]._replace(read=read), made["adapter"])
    return jax.jit(model.apply)(found.weights(), Adapters(modules={}, head={}), BATCH)


def torch_features(model):
    with torch.no_grad():
        found = model(
            torch.tensor(BATCH["input_ids"]),
            attention_mask=torch.tensor(BATCH["attention_mask"]),
            output_hidden_states=True,
        )
    return found.hidden_states[-1].numpy(), found.logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_against_pytorch(variant, tmp_path):
    model = reference(variant)
    model.save_pretrained(tmp_path)
    for found, expected in zip(found_features(tmp_path), torch_features(model), strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-4, rtol=1e-4)
