"""An entry of the catalogue: a method is a factory that returns a record, and a round calls no other names.

The records are in `core.learning` (what is trained), `core.exchange` (what is sent and averaged) and `core.network`
(over what, and by whose decision). Structure is in a record's closures; numbers are there too, traced ones, since
methods are made inside the program, from options whose traced fields hold arrays (see `core.numbers`). Between methods
pass arrays alone. Each record is written for one client, or for the server; the round maps clients. Dimension letters
are those of `core.types`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_lora.core.types import Adapters, Packing


class Method(NamedTuple):
    """A method as the catalogue lists it.

    slot: what it does, which is the section of the configuration that chooses it: "sparsifier", "aggregation", ...
    name: by which it is chosen.
    options: frozen dataclass of its options, a subclass of `core.numbers.Options`.
    make: `(options, Context) -> record` of the slot. It runs inside the program: it never branches in Python on a
      traced field, and `options.__post_init__` has checked their values before.
    needs: properties of the rest of an experiment without which it does not work, see `config.catalogue.PROPERTIES`.
    breaks: those that it takes from the experiment. Options may add to both, see `Options.needs`.
    """

    slot: str
    name: str
    options: type
    make: Callable[[Any, "Context"], Any]
    needs: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()


class Context(NamedTuple):
    """What is fixed of an experiment before its numbers: shapes, and the records made earlier.

    num_clients: K. cohort_size: C. num_classes: labels of the task.
    image_shape: `(height, width, channels)` of an image task; None for text.
    rounds: T. local: the section `local` of the configuration, steps and optimizer of the clients.
    num_examples: of the training pool, N. packing: of the clients' batches; None where nothing is packed.
    like: shapes of the adapters; None before there are any.
    made: slot -> record, of the slots that come earlier in the catalogue.
    """

    num_clients: int
    cohort_size: int
    num_classes: int = 0
    image_shape: tuple[int, int, int] | None = None
    rounds: int = 1
    local: Any = None
    num_examples: int = 0
    packing: Packing | None = None
    like: Adapters | None = None
    made: Mapping[str, Any] = {}
