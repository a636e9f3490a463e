"""Adapters as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedjax_lora.base import Adapters
from fedjax_lora.io.files import atomic_folder


def export(
    folder: str | Path, adapters: Adapters, names: Mapping[str, str], rank: int, alpha: float, base_model: str
) -> None:
    """Write adapters for `peft.PeftModel.from_pretrained`; the task head goes to `head.safetensors`.

    Args:
      folder: new or empty.
      adapters: trained ones; components beyond `rank` are left out.
      names: module name -> its name in the base model, with `{layer}`.
      rank, alpha: structural rank and LoRA's alpha.
      base_model: folder or hub id that the adapters were trained on.

    Raises:
      ValueError: the folder is in use.
    """
    tensors, targets = {}, []
    for module, factors in adapters.modules.items():
        a, b = np.asarray(factors.a)[:, :, :rank], np.asarray(factors.b)[:, :rank]
        for layer in range(a.shape[0]):
            # Whole names: PEFT matches endings, and that of `down` is the ending of `output` too.
            targets.append(names[module].format(layer=layer))
            prefix = f"base_model.model.{targets[-1]}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[layer].T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[layer].T)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / "adapter_model.safetensors")
        save_file({name: np.asarray(leaf) for name, leaf in adapters.head.items()}, partial / "head.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
