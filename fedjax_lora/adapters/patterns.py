"""Patterns of module names, as PEFT's `rank_pattern` and `alpha_pattern` have them."""

import re
from collections.abc import Mapping
from typing import Any


def matching_key(pattern: Mapping[str, Any], module: str) -> str | None:
    """The first key that a name matches, an expression of the whole name or of its end from a dot on; None for none."""
    return next((key for key in pattern if re.match(_ending(key), module)), None)


def is_expression(key: str) -> bool:
    """Whether a key can be matched."""
    try:
        re.compile(_ending(key))
    except re.error:
        return False
    return True


def _ending(key: str) -> str:
    """What a name must match of which a pattern speaks, as PEFT has it."""
    return rf"(.*\.)?({key})$"
