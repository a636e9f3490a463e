"""The documentation against the code: every key, every default, every option of a method."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ExperimentConfig, dump, load_config

CONFIGURATION = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_documented_defaults_are_those_of_the_code(tmp_path):
    """The oracle is the code: the page's block, read as a user's file, is the default configuration, key by key."""
    block = CONFIGURATION.split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "defaults.yaml"
    path.write_text(block)
    assert load_config(path) == ExperimentConfig()
    documented = set(re.findall(r"\b(\w+):(?= |\n)", re.sub(r"#.*", "", block)))
    assert documented == set(re.findall(r"\b(\w+):", dump(ExperimentConfig())))


@pytest.mark.parametrize("section", ["task", "sparsifier", "aggregation", "drift", "server", "control", "training"])
def test_the_documented_options_are_those_of_each_method(section):
    """The oracle is the code: one row a method, with its options and their defaults."""
    for name, method in Catalogue.of().by_slot[section].items():
        fields = [field for field in dataclasses.fields(method.options) if field.name != "name"]
        options = ", ".join(f"`{field.name}: {_as_yaml(field.default)}`" for field in fields) or "–"
        assert f"| `{name}` | {options} |" in CONFIGURATION, f"| `{name}` | {options} |"


def _as_yaml(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
