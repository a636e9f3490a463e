"""What a sweep varies: names of folders, what is refused, grids, draws and lists."""

import json
import math
import re

import numpy as np
import pytest

from fedjax_lora.config.sweeps import folder_name, grid, override, parse_over, product, read_sweep
from fedjax_lora.config.yaml import parse_value
from fedjax_lora.core.errors import ConfigError

ODD_VALUES = [
    *(
        "a/b",
        "a_b",
        "A_b",
        "a:b",
        "../x",
        "..",
        ".",
        "",
        ".hidden",
        "~",
        "-rf",
        "a\nb",
        "nul",
        "é",
        "e\u0301",
        "É",
        "🙂",
    ),
    *("x" * 300, "x" * 301, "X" * 300, "ü" * 300, "x" * 90),
    *(1, 1.5, 1e-30, 1e22, True, None, "1", "true", "null", "[1]"),
    *([1, 2], ["1", "2"], [[1], 2], {"name": "dense"}, {"name": "Dense"}, {"a": {"b": ["c/d", "e"]}}),
]


def test_names_of_folders_differ_are_short_and_hold_their_values():
    """Oracle: sets of names in small letters; the values as YAML reads the overrides back."""
    settings = grid({"model.pretrained": ODD_VALUES, "seed": [0, 1]})
    names = [folder_name(setting) for setting in settings]
    assert len({name.lower() for name in names}) == 2 * len(ODD_VALUES)
    for name in names:
        assert len(name) <= 100 and re.fullmatch(r"model[ -.0-~]+", name), name
    given = [override("model.pretrained", setting["model.pretrained"]) for setting in settings]
    values = [parse_value(text.partition("=")[2], "value") for text in given]
    assert values[::2] == values[1::2] == json.loads(json.dumps(ODD_VALUES))


def test_a_setting_without_keys_has_a_folder_of_its_own():
    assert folder_name({}) == "default"


def test_draws_that_repeat_are_left_out(tmp_path):
    """Of ten draws from two values two are different."""
    path = tmp_path / "sweep.yaml"
    path.write_text("random: {trials: 10, over: {lora.rank: [4, 8]}}\n")
    assert sorted(setting["lora.rank"] for setting in read_sweep(path)) == [4, 8]


def test_names_that_are_short_and_plain_are_the_overrides():
    """The names that earlier sweeps have given."""
    axes = parse_over(['control.name=["fixed"]', "control.V=[1, 0.5]", "lora.targets=[[query, up]]"])
    assert [folder_name(setting) for setting in grid(axes)] == [
        f'control.name="fixed",control.V={value},lora.targets=["query", "up"]' for value in ("1", "0.5")
    ]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["seed=[0, 1, 0]"], "sweep must be over each value once, got seed=0 twice"),
        (["wireless.bandwidth_hz=[1e6, 1000000.0]"], "got wireless.bandwidth_hz=1000000.0 twice"),
        (["seed=[0]", " seed =[1]"], "sweep must be over each key once, got 'seed' twice"),
        (["seed"], "sweep must be over key=[value, value, ...], got 'seed'"),
        (["seed=1"], "sweep must be over key=[value, value, ...], got 'seed=1'"),
        (["seed=[]"], "sweep must be over key=[value, value, ...], got 'seed=[]'"),
    ],
)
def test_what_is_there_twice_or_no_value_is_one_line(over, message):
    """The message itself."""
    with pytest.raises(ConfigError) as caught:
        grid(parse_over(over))
    assert str(caught.value).endswith(message)


def test_parts_are_combined_and_vary_a_key_once():
    """By hand."""
    assert product([{"a": 1}, {"a": 2}], [{"b": 3}]) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    with pytest.raises(ConfigError, match="sweep must be over each key once, got 'a' twice"):
        product([{"a": 1}], [{"a": 2}])


def test_a_file_has_a_grid_draws_and_a_list(tmp_path):
    """Oracle: the ranges that the file names; draws are the same again, and a key's own whatever the others are."""
    path = tmp_path / "sweep.yaml"

    def read(more=""):
        path.write_text(
            "grid: {control.V: [1, 3]}\nlist: [{sparsifier: soft}, {sparsifier: top_k, control.keep_ratio: 0.25}]\n"
            "random: {trials: 50, over: {lr: {log: [1.0e-4, 1.0e-1]}, alpha: {uniform: [4, 16]}, rank: [4, 8]"
            f"{more}}}}}\n"
        )
        return read_sweep(path)

    found = read()
    assert len(found) == 2 * 2 * 50 and found == read()
    draws = found[:50]
    assert [row["lr"] for row in draws] == [row["lr"] for row in read(", more: [1, 2]")[:50]]
    logs = np.log10([row["lr"] for row in draws])
    assert logs.min() > -4 and logs.max() < -1 and abs(logs.mean() + 2.5) < 0.5
    assert all(4 <= row["alpha"] <= 16 for row in draws) and {row["rank"] for row in draws} == {4, 8}
    assert len({row["lr"] for row in draws}) == 50
    assert {(row["sparsifier"], row.get("control.keep_ratio")) for row in found} == {("soft", None), ("top_k", 0.25)}
    assert math.isclose(sum(row["control.V"] for row in found), 400)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must have one of the sections grid, random, list, got none"),
        ("grids: {a: [1]}", "must have the sections grid, random, list, got 'grids'"),
        ("grid: [1]", "grid must be a mapping of a sweep, got [1]"),
        ("grid: {a: 1}", "sweep must be over a list of values of a, got 1"),
        ("grid: {a: soft}", "sweep must be over a list of values of a, got 'soft'"),
        ("list: {a: 1}", "list must be a list of mappings key: value of a sweep, got {'a': 1}"),
        ("random: {over: {a: [1]}}", "random.trials must be a whole number of at least 1, got 0"),
        ("random: {trials: 2, sed: 1, over: {a: [1]}}", "random must have trials, seed and over, got 'sed'"),
        ("random: {trials: 2, seed: -1, over: {a: [1]}}", "random.seed must be a whole number of at least 0, got -1"),
        ("random: {trials: 2, over: {a: {log: [0, 1]}}}", "random.over.a must be a list, {uniform: [low, high]}"),
        ("random: {trials: 2, over: {a: {uniform: [2, 1]}}}", "with low < high, got {'uniform': [2, 1]}"),
        ("random: {trials: 2, over: {a: 3}}", "got 3"),
        ("grid: {a: [1]}\nlist: [{a: 2}]", "sweep must be over each key once, got 'a' twice"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, text, message):
    """The message itself."""
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
