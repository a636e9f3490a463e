"""A small BERT, GPT-2 or Llama with a tokenizer of whole words, as a Hugging Face folder."""

import json
from pathlib import Path

import jax
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedjax_lora.models import bert, table

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = ["good", "bad", "film", "so", "long", "and", "dull"]
LAYERS, WIDTH, MLP = 2, 12, 20


def save_toy_bert(folder: Path) -> Path:
    """Write model and tokenizer; the weights are PyTorch's own random ones, and without it a test is skipped."""
    pytest.importorskip("torch")
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        intermediate_size=MLP,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_minilm(folder: Path) -> Path:
    """A BERT of MiniLM's shape but for its vocabulary, with random weights; it needs no PyTorch."""
    fields = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    return save_bert(folder, fields)


def save_bert(folder: Path, fields: dict[str, int]) -> Path:
    """A BERT of this `config.json` but for its vocabulary, in the same way."""
    fields = fields | {"vocab_size": len(SPECIAL + WORDS)}
    config = bert.shape(fields)
    rows = bert.weights(config)
    tensors = table.tensors(rows, table.init(rows, jax.random.key(0), config.num_layers, config.compute_dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))
    return _with_tokenizer(folder)


def save_toy_llama(folder: Path) -> Path:
    """The same of a Llama, whose three heads share keys."""
    pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=MLP,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_toy_gpt2(folder: Path) -> Path:
    """The same of a GPT-2."""
    pytest.importorskip("torch")
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL + WORDS),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=3,
        n_inner=MLP,
        n_positions=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    return folder
