"""A small BERT, GPT-2 or Llama with a tokenizer of whole words, as a Hugging Face folder."""

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
