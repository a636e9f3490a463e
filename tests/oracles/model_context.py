"""What a model is made with, for tests: a classification and LoRA."""

from fedjax_lora.adapters import lora
from fedjax_lora.core.methods import Context
from fedjax_lora.tasks import classification


def model_context(num_classes: int = 2, image_shape: tuple[int, int, int] | None = None) -> Context:
    """The context of a model of so many classes, with the task and the adapter made."""
    context = Context(num_clients=1, cohort_size=1, num_classes=num_classes, image_shape=image_shape)
    task = classification.make(classification.ClassificationOptions(), context)
    return context._replace(made={"task": task, "adapter": lora.make(lora.LoraAdapterOptions(), context)})
