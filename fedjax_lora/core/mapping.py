"""A mapping in a configuration whose keys another library knows."""

from typing import Any


class Mapped(dict[str, Any]):
    """A mapping from words to words, numbers, truth values and tuples of them, with a hash: it is not to be changed.

    Its order counts: of two patterns that match one name, the first decides.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a dict has none
        return hash(tuple(self.items()))
