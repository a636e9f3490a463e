"""The one table of model families, by the `model_type` of a Hugging Face `config.json`."""

from fedjax_lora.models import bert, gemma, llama, qwen
from fedjax_lora.models.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "llama": llama.FAMILY,
    "mistral": llama.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma": gemma.FAMILY,
}
