"""The one table of model families, by the `model_type` of a Hugging Face `config.json`."""

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
