"""What a method of one's own is written with: the records, and how its options are declared.

Example, `mine.py`, a sparsifier that is chosen by `sparsifier: half` and `--methods mine.py`:

    import dataclasses
    from typing import Literal

    from fedjax_lora.methods import Context, Method, Options, Sparsifier, traced


    @dataclasses.dataclass(frozen=True, kw_only=True)
    class HalfConfig(Options):
        \"\"\"Half of what a client learned.

        share: what is kept of each value; a number that runs may sweep over in one program.
        \"\"\"

        name: Literal["half"] = "half"
        share: float = traced(0.5)


    def make(options: HalfConfig, context: Context) -> Sparsifier: ...


    METHOD = Method("sparsifier", "half", HalfConfig, make)

`make` runs inside the program: it never branches in Python on a traced field. `needs` and `breaks` are of
`PROPERTIES`.
"""

from fedjax_lora.config.properties import PROPERTIES
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import (
    Aggregate,
    Aggregator,
    Enter,
    Fold,
    Live,
    Message,
    Offer,
    Received,
    Size,
    Sparsifier,
    Traffic,
    Transform,
)
from fedjax_lora.core.learning import (
    Adapter,
    Broadcast,
    Client,
    Correction,
    Features,
    Hidden,
    Model,
    Optimizer,
    Places,
    Site,
    Task,
    Trained,
    Trainer,
    Work,
)
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import (
    Arrival,
    Controller,
    Decision,
    Delivery,
    Observation,
    Outcome,
    Population,
    Radio,
    Wireless,
)
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.tasks.common import TaskOptions

__all__ = [
    "PROPERTIES",
    "Adapter",
    "Adapters",
    "Aggregate",
    "Aggregator",
    "Arrival",
    "Broadcast",
    "Client",
    "Context",
    "Controller",
    "Correction",
    "Count",
    "Decision",
    "Delivery",
    "Enter",
    "Factors",
    "Features",
    "Fold",
    "Hidden",
    "Live",
    "Message",
    "Method",
    "Model",
    "Observation",
    "Offer",
    "Optimizer",
    "Options",
    "Outcome",
    "Places",
    "Population",
    "Radio",
    "Received",
    "Scope",
    "Site",
    "Size",
    "Sparsifier",
    "Task",
    "TaskOptions",
    "Traffic",
    "Trained",
    "Trainer",
    "Transform",
    "Wireless",
    "Work",
    "traced",
]
