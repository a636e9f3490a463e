"""The one table of model families, by the `model_type` of a Hugging Face `config.json`."""

from fedjax_lora.models import bert
from fedjax_lora.models.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
}
