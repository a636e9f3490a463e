"""The documentation against the code: every key, every default, every option of a method."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ExperimentConfig, dump, load_config
from fedjax_lora.data import known, sources, tables

DATA = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
CONFIGURATION = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_documented_defaults_are_those_of_the_code(tmp_path):
    """The oracle is the code: the page's block, read as a user's file, is the default configuration, key by key."""
    block = CONFIGURATION.split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "defaults.yaml"
    path.write_text(block)
    assert load_config(path) == ExperimentConfig()
    documented = set(re.findall(r"\b(\w+):(?= |\n)", re.sub(r"#.*", "", block)))
    assert documented == set(re.findall(r"\b(\w+):", dump(ExperimentConfig())))


@pytest.mark.parametrize(
    "section", ["task", "sparsifier", "aggregation", "drift", "server", "control", "arrival", "training"]
)
def test_the_documented_options_are_those_of_each_method(section):
    """The oracle is the code: one row a method, with its options and their defaults."""
    for name, method in Catalogue.of().by_slot[section].items():
        fields = [field for field in dataclasses.fields(method.options) if field.name != "name"]
        options = ", ".join(f"`{field.name}: {_as_yaml(field.default)}`" for field in fields) or "–"
        assert f"| `{name}` | {options} |" in CONFIGURATION, f"| `{name}` | {options} |"


@pytest.mark.parametrize("method", sources.METHODS, ids=lambda method: method.name)
def test_the_documented_sources_have_the_options_of_the_code(method):
    """The oracle is the code: the names of a source's options stand in its row, or in the row that it refers to."""
    rows = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)` \|.*$", DATA, re.MULTILINE)}
    said = rows[method.name] + (rows["parquet"] if "as `parquet`" in rows[method.name] else "")
    options = {field.name for field in dataclasses.fields(method.options)} - {"source"}
    if method.name == "digits":  # whose options are those of `tsv`
        options = set()
    elif method.name != "csv":  # parts the fields of CSV alone
        options -= {"delimiter"}
    assert options <= set(re.findall(r"`(\w+)", said))


def test_the_documented_columns_and_known_data_sets_are_those_of_the_code():
    """The oracle is the code: every common name, every known data set, the split that tests and its columns."""
    rows = [set(re.findall(r"`([\w\[%:\]]+)`", row)) for row in DATA.split("\n") if row.startswith("| `")]
    names = tables.TEXT_NAMES + tables.LABEL_NAMES + tables.WORD_NAMES + tables.TAG_NAMES + tables.PROMPT_NAMES
    names += tables.CONTEXT_NAMES + tables.RESPONSE_NAMES + tables.CLIENT_NAMES + tuple(sum(tables.PAIR_NAMES, ()))
    assert set(names) <= set().union(*rows)
    for name, entry in known.KNOWN.items():
        row = next(row for row in rows if name in row)
        columns = {column for role, column in entry.columns.given().items() if role not in ("label", "client")}
        assert {entry.test, *columns} <= row


def _as_yaml(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
