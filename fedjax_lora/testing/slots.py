"""Which laws the methods of each slot are held to, on what, and in which context."""

from collections.abc import Callable

from fedjax_lora.core.methods import Context
from fedjax_lora.testing import aggregation, data, examples, models, network, sparsifiers, training
from fedjax_lora.testing.laws import Exercise, Law

EXERCISES: dict[str, Exercise] = {
    "task": models.exercise_task,
    "adapter": models.exercise_adapter,
    "model": models.exercise_model,
    "wireless": network.exercise_wireless,
    "control": network.exercise_control,
    "arrival": network.exercise_arrival,
    "sparsifier": sparsifiers.exercise,
    "aggregation": aggregation.exercise,
    "drift": training.exercise_drift,
    "server": training.exercise_server,
    "training": training.exercise_training,
}
"""Slot -> what the functions of its record give on the examples; data have neither numbers nor programs."""

LAWS: dict[str, dict[str, Law]] = {
    "data": data.LAWS,
    "task": models.TASK,
    "adapter": models.ADAPTER,
    "model": models.MODEL,
    "wireless": network.WIRELESS,
    "control": network.CONTROL,
    "arrival": network.ARRIVAL,
    "sparsifier": sparsifiers.LAWS,
    "aggregation": aggregation.LAWS,
    "drift": training.DRIFT,
    "server": training.SERVER,
    "training": training.TRAINING,
}
"""Slot -> its own laws by name."""

_CONTEXTS: dict[str, Callable[[], Context]] = {"model": models.context, "training": training.context}


def context(slot: str) -> Context:
    """What the methods of a slot are made in, where the author gives nothing else."""
    return _CONTEXTS.get(slot, examples.context)()
