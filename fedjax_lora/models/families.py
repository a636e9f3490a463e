"""The one table of model families, by the `model_type` of a Hugging Face `config.json`, or by its `architectures`."""

import re
from typing import Any

from fedjax_lora.models import bert, distilbert, gemma, gpt2, llama, qwen, roberta, vit
from fedjax_lora.models.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "xlm-roberta": roberta.XLM,
    "camembert": roberta.CAMEMBERT,
    "distilbert": distilbert.FAMILY,
    "gpt2": gpt2.FAMILY,
    "vit": vit.FAMILY,
    "deit": vit.DEIT,
    "llama": llama.FAMILY,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma": gemma.FAMILY,
}

CLASSES: dict[str, str] = {
    "Bert": "bert",
    "Roberta": "roberta",
    "XLMRoberta": "xlm-roberta",
    "Camembert": "camembert",
    "DistilBert": "distilbert",
    "GPT2": "gpt2",
    "ViT": "vit",
    "DeiT": "deit",
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
}
"""What the names of a family's classes begin with -> its `model_type`."""

_CLASS = re.compile(rf"({'|'.join(CLASSES)})(Model|LMHeadModel|For[A-Z]\w*)")


def agrees(model_type: str, architectures: Any) -> bool:
    """Whether one of the classes is of the family, by how their names begin, or none is named."""
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    begins = tuple(begin for begin, known in CLASSES.items() if known == model_type)
    return not names or any(name.startswith(begins) for name in names)


def model_type(architectures: Any) -> str | None:
    """The `model_type` of the first class that is of a known family; None where there is none."""
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    return next((CLASSES[match[1]] for name in names if (match := _CLASS.fullmatch(name))), None)
