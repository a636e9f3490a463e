"""Choice of the modules that carry an adapter."""

import pytest

from fedjax_lora.adapters import targets
from fedjax_lora.core.learning import Site

AVAILABLE = {"query": Site("qv", 0, 12, 12), "value": Site("qv", 12, 12, 12), "up": Site("up", 0, 12, 20)}


def test_choose_keeps_the_named_entries_in_order():
    assert list(targets.choose(("up", "query"), AVAILABLE).items()) == [
        (name, AVAILABLE[name]) for name in ("up", "query")
    ]


def test_choose_names_the_nearest_and_the_valid_ones():
    message = r"lora.targets must be among query, value, up, got 'values' \(did you mean 'value'\?\)"
    with pytest.raises(ValueError, match=message):
        targets.choose(("query", "values"), AVAILABLE)
