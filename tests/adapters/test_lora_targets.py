"""Choice of the modules that carry an adapter."""

import pytest

from fedjax_lora.adapters import targets

AVAILABLE = {"query": (12, 12), "value": (12, 12), "up": (12, 20)}


def test_choose_keeps_the_named_entries_in_order():
    assert list(targets.choose(("up", "query"), AVAILABLE).items()) == [("up", (12, 20)), ("query", (12, 12))]


def test_choose_names_the_nearest_and_the_valid_ones():
    message = r"lora.targets must be among query, value, up, got 'values' \(did you mean 'value'\?\)"
    with pytest.raises(ValueError, match=message):
        targets.choose(("query", "values"), AVAILABLE)
