"""Options of the engine."""

import dataclasses
from typing import Literal, get_args

Place = Literal["device", "host"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the simulation is executed; none of it changes a result but by the order in which float32 numbers are added.

    client_chunk: clients trained at once on each device; `auto` fits their activations to the device.
    trials_at_once: trials of a sweep that run side by side in one program; `auto` runs as many as fit the device.
    eval_every: rounds between evaluations (and checkpoints).
    eval_batch_size: examples of one evaluation step.
    data: where the training pool is: whole on each `device`, or on the `host`, where a device holds what the cohorts of
      the running rounds need, and of the next ones: between two evaluations, that is.
    error_norms: whether `sparsification_error` and `covariance_error` are measured. That takes all updates of a round
      at once; else each is added to the average as it comes, and a round holds one copy of its clients' adapters.
    reproducible: clients are gathered and added in their order, `client_chunk` at a time: bits depend neither on the
      number of devices nor on that of processes, and every device holds the state of all clients.
    model_devices: devices that hold one frozen base together, each a part of its large weights, and train the same
      clients; they divide the number of devices.
    """

    client_chunk: int | Literal["auto"] = "auto"
    trials_at_once: int | Literal["auto"] = "auto"
    eval_every: int = 5
    eval_batch_size: int = 64
    data: Place = "device"
    error_norms: bool = True
    reproducible: bool = False
    model_devices: int = 1

    def __post_init__(self):
        if self.client_chunk != "auto" and self.client_chunk < 1:
            raise ValueError(f"client_chunk must be 'auto' or at least 1, got {self.client_chunk}")
        if self.reproducible and self.client_chunk == "auto":
            raise ValueError("client_chunk must be a number where reproducible is true, got 'auto'")
        if self.reproducible and not self.error_norms:
            raise ValueError("error_norms must be true where reproducible is true, got False")
        if self.trials_at_once != "auto" and self.trials_at_once < 1:
            raise ValueError(f"trials_at_once must be 'auto' or at least 1, got {self.trials_at_once}")
        if self.data not in get_args(Place):
            raise ValueError(f"data must be one of {', '.join(get_args(Place))}, got {self.data!r}")
        if self.eval_every < 1:
            raise ValueError(f"eval_every must be at least 1, got {self.eval_every}")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")
        if self.model_devices < 1:
            raise ValueError(f"model_devices must be at least 1, got {self.model_devices}")
        if self.reproducible and self.model_devices > 1:
            raise ValueError(f"model_devices must be 1 where reproducible is true, got {self.model_devices}")
