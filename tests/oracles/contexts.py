"""Contexts that methods are made in, where a test needs one without an experiment."""

from typing import Any

from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters


def context(like: Adapters | None = None, num_clients: int = 4, cohort_size: int = 4, **more: Any) -> Context:
    """Adapters of these shapes, or arrays of them, K clients, and a cohort of C; `more` are other fields of `Context`."""
    return Context(num_clients=num_clients, cohort_size=cohort_size, like=like, **more)
