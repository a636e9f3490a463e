"""The keys of a configuration: what each means, whether it sweeps, and the file that says so."""

import dataclasses
from typing import Literal

import pytest

from fedjax_lora.app.keys import document, listing, select
from fedjax_lora.config.catalogue import METHODS, SLOTS, Catalogue
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, load_config, to_dict
from fedjax_lora.config.keys import STATIC, keys, meanings
from fedjax_lora.config.presets import PRESETS, preset
from fedjax_lora.config.template import commented
from fedjax_lora.config.values import key_of
from fedjax_lora.core.numbers import traced_keys
from fedjax_lora.methods import Method, Options, traced


def flat(tree, path=""):
    """Dotted key -> value."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) and value else {f"{path}{name}": value}
    return found


KEYS = keys(Catalogue.of())


def test_every_key_is_there_with_its_default():
    """Oracle: the default configuration, and the classes of all methods."""
    defaults = flat(to_dict(ExperimentConfig()))
    names = {slot: Catalogue.of().names(slot)[0] for slot in SLOTS}
    listed = {key.key: key.default for key in KEYS if not key.methods or names[key.key.split(".")[0]] in key.methods}
    assert listed == defaults
    for method in METHODS:
        own = {field.name for field in dataclasses.fields(method.options)} - {key_of(method.slot)}
        assert own == {
            key.key.split(".")[1] for key in KEYS if key.key.split(".")[0] == method.slot and method.name in key.methods
        }


def test_every_key_has_a_meaning_and_says_whether_it_sweeps():
    """A law: the docstring of a class has a line of the form `name: meaning` for each of its fields."""
    assert not [key.label for key in KEYS if not key.meaning]
    assert not [key.label for key in KEYS if key.static == "not declared as traced"]


def test_what_sweeps_is_what_is_declared_as_traced():
    """Oracle: `core.numbers.traced_keys` of each method's options and of the other sections."""
    swept = {(key.key, method) for key in KEYS if key.static is None for method in key.methods or (None,)}
    config = load_config(None, ["local.optimizer={name: momentum, momentum: 0.9, clip_norm: 1.0}"])
    for name in traced_keys(config):
        section = name.split(".")[0]
        assert (name, getattr(config, section).name if section in SLOTS else None) in swept, name
    assert ("control.V", "tsfa") in swept and ("control.tail", "tsfa") not in swept


def test_every_reason_is_of_a_key_that_is_static():
    """Oracle: the keys themselves; a row of the table that names none is a mistake."""
    for start in STATIC:
        assert [key for key in KEYS if (key.key + ".").startswith(start + ".") and key.static], start


def test_meanings_are_read_from_docstrings():
    """By hand: several fields in a line, several lines of a field, a base class, and what is no field."""

    @dataclasses.dataclass(frozen=True)
    class Base:
        """Base.

        first: of the base,
          in two lines.
        second: of the base.
        """

        first: int = 0
        second: int = 0

    @dataclasses.dataclass(frozen=True)
    class Own(Base):
        """Own: not a field.

        second: its own; `third: x` is none. third, fourth: both, and not: this.

        Args: none.
        """

        third: int = 0
        fourth: int = 0
        fifth: int = 0

    assert meanings(Own) == {
        "first": "of the base, in two lines.",
        "second": "its own; `third: x` is none.",
        "third": "both, and not: this.",
        "fourth": "both, and not: this.",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig(Options):
    """A user's.

    share: of it.
    """

    name: Literal["mine"] = "mine"
    share: float = traced(0.5)
    words: tuple[str, ...] = ("a\nb", "yes", "1")
    number: int = 3


MINE = Method("sparsifier", "mine", MineConfig, lambda options, context: None)


@pytest.mark.parametrize("name", [*PRESETS, "defaults", "user"])
def test_the_file_to_begin_with_is_the_configuration_round_trip(name, tmp_path):
    table = Catalogue.of([MINE] if name == "user" else [])
    if name in PRESETS:
        config = preset(name)
    else:
        config = load_config(None, ["sparsifier=mine"] if name == "user" else [], methods=[MINE])
    text = commented(config, table)
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    assert load_config(path, methods=[MINE]) == config
    assert load_config(path, base=preset("digits-tsfa"), methods=[MINE]) == config
    lines = text.splitlines()
    for key in flat(to_dict(config)):
        assert sum(line.strip().startswith(f"{key.split('.')[-1]}:") for line in lines) >= 1, key
    assert max(map(len, lines)) <= 120
    if name == "digits-tsfa":
        place = lines.index("  V: 10.0")
        assert "sweeps]" in lines[place - 1] and "weight of what is not sent" in "".join(lines[place - 4 : place])


def test_keys_are_selected_by_a_part_or_a_pattern():
    """By hand."""
    assert [key.key for key in select(KEYS, "rician")] == ["wireless.rician_k_db"]
    assert {key.key.split(".")[0] for key in select(KEYS, "control.*")} == {"control"}
    assert [key.label for key in select(KEYS, "control.tail")] == ["control.tail (tsfa)"]
    assert select(KEYS, None) == KEYS
    with pytest.raises(ConfigError) as caught:
        select(KEYS, "bandwith_hz")
    assert str(caught.value) == "PATTERN must be of a key, got 'bandwith_hz'; did you mean bandwidth_hz?"


def test_keys_are_written_and_told_with_a_users_own():
    """Oracle: the lines by hand."""
    mine = select(keys(Catalogue.of([MINE])), "sparsifier.*")
    lines = listing(mine).splitlines()
    assert "sparsifier.share (mine): a finite number; default 0.5; sweeps" in lines
    assert "    of it." in lines
    assert "sparsifier.number (mine): an integer; default 3; static: not declared as traced" in lines
    told = {entry["key"]: entry for entry in document(mine) if "mine" in entry["methods"]}
    assert told["sparsifier.share"] == {
        "key": "sparsifier.share",
        "methods": ("mine",),
        "type": "a finite number",
        "default": 0.5,
        "meaning": "of it.",
        "static": None,
        "sweeps": True,
    }
