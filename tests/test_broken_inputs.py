"""Broken configurations and sentence files, made at random: each is read, or refused in one line that names the place.

The oracle is the kind of the error and the shape of its message. The examples are few and the same each time, but for
`make fuzz`.
"""

import dataclasses
import re
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedjax_lora.app import cli, runner
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, dump, load_config, to_dict
from fedjax_lora.config.presets import PRESETS, preset
from fedjax_lora.data import tsv
from fedjax_lora.data.tables import class_names
from oracles.fuzzing import examples, nothing_else_read


def places(fields: dict, above: tuple = ()) -> list[tuple[str, ...]]:
    """The path of every section and of every key."""
    here = [(*above, key) for key in fields]
    return here + [
        place for key, value in fields.items() if isinstance(value, dict) for place in places(value, (*above, key))
    ]


PLACES = sorted({place for config in (ExperimentConfig(), *map(preset, PRESETS)) for place in places(to_dict(config))})

WORDS = st.sampled_from(
    ["yes", "010", "1:30", "1e999", "-0", "0x", ".nan", "dense", "tsfa", "sgd", "none", "a.b", "a\nb"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.text(max_size=8)
    | st.sampled_from([10**40, -1])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | WORDS, inner, max_size=3)
)
JUNK = st.text(alphabet=string.printable + "\x00\ufeff\u2028é", max_size=30)


@st.composite
def broken(draw) -> tuple[str, list[str]]:
    """Text of a file that changes one thing, and the words of which an error must hold one."""
    keys = list(draw(st.sampled_from(PLACES)))
    if draw(st.integers(0, 3)) == 0:
        keys[-1] = draw(
            st.sampled_from([keys[-1] + "x", keys[-1][1:], keys[-1].upper(), "V", "latency_budget_s", "é\n"])
        )
    value = draw(VALUES)
    for key in reversed(keys):
        value = {key: value}
    text = yaml.safe_dump(value, allow_unicode=draw(st.booleans()))
    if draw(st.integers(0, 4)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(JUNK) + text[cut:]
        keys += re.findall(r"\w+", text)
    return text, keys


def is_named(message: str, keys: list[str]) -> bool:
    """Whether the message has one of the keys, as it is or in quotes, or says that the text is no YAML."""
    words = re.findall(r"\w+", message)
    return any(key in words or repr(key) in message for key in keys) or "configuration" in message


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("broken") / "file"


@examples(250)
@given(broken(), st.sampled_from([None, *PRESETS]))
def test_a_broken_configuration_is_read_or_refused_in_one_line(file, change, base):
    text, keys = change
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(file, base=preset(base) if base else None)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert is_named(str(error), keys), str(error)
    else:
        assert dataclasses.is_dataclass(config)
        file.write_text(dump(config), encoding="utf-8")
        assert load_config(file) == config


@examples(50)
@given(broken())
def test_a_broken_configuration_leaves_no_run_and_reads_no_other_file(file, change, capsys):
    """Through the command line, up to where a simulation would be built, which is refused here."""
    file.write_text(change[0], encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch, nothing_else_read(file):
        patch.setattr(runner, "build", refuse)
        assert cli.main(["run", str(file), "--out", str(file.with_name("run"))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("fedjax-lora: error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(line.startswith(("fedjax-lora: error: ", "fedjax-lora: warning: ")) for line in lines)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def refuse(*_):
    raise ValueError("nothing is built")


PIECES = st.sampled_from(
    [b"good film", b"\t", b"\t1\n", b"\t0\n", b"\n", b"\r\n", b"\r", b"text\tlabel\n", b"label\ttext\n", b"\x00",
     b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b" ", b"nan", b"1e999", "é".encode()]
)  # fmt: skip
CONTENTS = st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join)


@examples(250)
@given(CONTENTS, st.one_of(st.just(b"good\t1\nbad\t0\n"), CONTENTS))
def test_a_broken_sentence_file_is_read_or_refused_in_one_line(file, test, train):
    tables = []
    try:
        for field, content in (("data.train", train), ("data.test", test)):
            file.write_bytes(content)
            with nothing_else_read(file):
                tables.append(tsv.read(str(file), field))
        names = class_names(*tables)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error).splitlines()) == 1
        assert str(error).startswith(("data.train ", "data.test "))
    else:
        assert len(names) == len(set(names)) >= 2
        texts, labels = ([table.columns[role] for table in tables] for role in ("text", "label"))
        assert set(names) == set(labels[0]) >= set(labels[1])
        assert list(map(len, texts)) == list(map(len, labels))
        assert all(word for column in (*texts, *labels) for word in column)
