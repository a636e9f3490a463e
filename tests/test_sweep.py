"""Sweeps: names of folders, what is refused, what is kept. Runs are replaced where what is made of them matters."""

import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedjax_lora.app import sweep as sweeps
from fedjax_lora.app.sweep import combinations, sweep
from fedjax_lora.config.experiment import ConfigError, dump, load_config
from fedjax_lora.config.yaml import parse_value
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import sealed
from fedjax_lora.io.log import RunFolder

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
    listed = json.dumps(ODD_VALUES)
    over = [f"model.pretrained={json.dumps(ODD_VALUES, ensure_ascii=False)}", "seed=[0, 1]"]
    chosen = combinations(over)
    assert len({name.lower() for name in chosen}) == 2 * len(ODD_VALUES)
    for name in chosen:
        assert len(name) <= 100 and re.fullmatch(r"model[ -.0-~]+", name), name
    values = [parse_value(first.partition("=")[2], "value") for first, _ in chosen.values()]
    assert values[::2] == values[1::2] == json.loads(listed)


def test_names_that_are_short_and_plain_are_the_overrides():
    """The names that earlier sweeps have given."""
    chosen = combinations(['control.name=["fixed"]', "control.V=[1, 0.5]", "lora.targets=[[query, up]]"])
    assert list(chosen) == [
        f'control.name="fixed",control.V={value},lora.targets=["query", "up"]' for value in ("1", "0.5")
    ]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["seed=[0, 1, 0]"], "sweep must be over each value once, got seed=0 twice"),
        (["wireless.bandwidth_hz=[1e6, 1000000.0]"], "got wireless.bandwidth_hz=1000000.0 twice"),
        (["seed=[0]", " seed =[1]"], "sweep must be over each key once, got 'seed' twice"),
    ],
)
def test_what_is_there_twice_or_no_value_is_one_line(over, message):
    """The message itself."""
    with pytest.raises(ConfigError) as caught:
        combinations(over)
    assert str(caught.value).endswith(message)


def load(overrides):
    return load_config(None, ["clients.count=6", *overrides])


@pytest.fixture
def ran(monkeypatch):
    """Configurations that were run, in their order; a run of seed 1 is refused, and one of seed 9 is interrupted."""
    found = []

    def run(config, path, resume, console, plan, methods, files):
        if config.seed == 1:
            raise ValueError("wireless.radius_m must be\n another, got 1")
        if config.seed == 9:
            raise KeyboardInterrupt
        found.append(config)
        RunFolder.create(path, dump(config), {"examples_hash": "a", "started": "today"})
        sealed.write(path / "summary.json", {"rounds": config.rounds})

    monkeypatch.setattr(sweeps, "run", run)
    monkeypatch.setattr(sweeps, "write_report", lambda folders, path: None)
    monkeypatch.setattr(sweeps, "comparison", lambda folders: "compared: " + " ".join(path.name for path in folders))
    monkeypatch.setattr("fedjax_lora.io.log.check_log", lambda folder, summary: None)
    monkeypatch.setattr(sweeps, "build", lambda config, methods: SimpleNamespace())
    monkeypatch.setattr(sweeps, "started_with", lambda simulation: {"examples_hash": "a"})
    return found


def test_a_combination_that_is_refused_stops_no_other_and_is_listed_at_the_end(ran, tmp_path):
    """Oracle: the messages of the configuration and of the run."""
    with pytest.warns(RunWarning) as caught:
        said = sweep(["seed=[-1, 0, 1, 2]"], load, tmp_path, Console(quiet=True)).splitlines()
    assert [str(warning.message).partition(" is refused: ")[0] for warning in caught] == ["seed=-1", "seed=1"]
    assert [config.seed for config in ran] == [0, 2]
    assert said == [
        "compared: seed=0 seed=2",
        "refused: seed=-1: seed must be from 0 to 2**32 - 1, got -1",
        "refused: seed=1: wireless.radius_m must be another, got 1",
    ]


def test_a_sweep_of_which_nothing_can_be_run_ends_in_the_first_reason(ran, tmp_path):
    with pytest.raises(ConfigError, match="seed must be from 0"):
        sweep(["seed=[-1, 1]"], load, tmp_path / "out", Console(quiet=True))
    assert not ran and not (tmp_path / "out").exists()


def test_an_interruption_stops_a_sweep(ran, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sweep(["seed=[0, 9, 2]"], load, tmp_path, Console(quiet=True))
    assert [config.seed for config in ran] == [0]


def test_one_configuration_in_two_ways_is_refused(ran, tmp_path):
    with pytest.raises(ConfigError, match=r"got one for both lora.alpha=8 and lora.alpha=8.0"):
        sweep(["lora.alpha=[8, 8.0]"], load, tmp_path, Console(quiet=True))
    assert not ran


def test_what_has_ended_is_kept_while_its_data_are_what_they_were(ran, tmp_path, monkeypatch):
    """Counting runs. Data that changed stop the sweep before anything else is run."""
    sweep(["seed=[0, 2]"], load, tmp_path, Console(quiet=True))
    sweep(["seed=[0, 2, 3]"], load, tmp_path, Console(quiet=True))
    assert [config.seed for config in ran] == [0, 2, 3]
    monkeypatch.setattr(sweeps, "started_with", lambda simulation: {"examples_hash": "b"})
    with pytest.raises(ValueError, match=r"data.examples_hash must be 'a' as in .*data.json .*choose another --out"):
        sweep(["seed=[4, 0]"], load, tmp_path, Console(quiet=True))
    assert len(ran) == 3
