"""What the configurations of methods have in common."""

import dataclasses
from typing import Literal, get_args, get_origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A method's options, with its name. Those whose type is a `Literal`, the name among them, are checked here.

    A class with checks of its own makes them in `__post_init__`, after `super().__post_init__()`.
    """

    name: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in allowed:
                words = repr(allowed[0]) if len(allowed) == 1 else f"one of {', '.join(map(str, allowed))}"
                raise ValueError(f"{field.name} must be {words}, got {value!r}")
