"""A mapping in a configuration whose keys another library knows."""

from typing import Any


class Mapped(dict[str, Any]):
    """A mapping from words to words, numbers, truth values and tuples of them, with a hash: it is not to be changed."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a dict has none
        return hash(frozenset(self.items()))
