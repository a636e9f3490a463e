"""Methods from a user's file: what may be in it, and one line for each mistake."""

import hashlib
import sys
from pathlib import Path

import pytest

from fedjax_lora.config.experiment import ConfigError, load_config
from fedjax_lora.config.user_methods import UserMethods, load

MINE = '''
from __future__ import annotations

import dataclasses
from typing import Literal

from fedjax_lora.methods import Method, Options, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class {0}Config(Options):
    """One of a user's."""

    name: Literal["{0}"] = "{0}"
    share: float = traced(0.5)
    length: int = 3


def make(options, context):
    raise AssertionError("a configuration makes no method")


METHOD = Method("sparsifier", "{0}", {0}Config, make)
'''


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_file_holds_a_method_or_a_sequence_of_them(file, tmp_path, monkeypatch):
    """Oracle: names, paths and hashes by hand."""
    one, both = file(MINE.format("one")), file(MINE.format("x") + "METHODS = [METHOD]\n", "both.py")
    found = load([one, both, one])
    assert [method.name for method in found.methods] == ["one", "x"]
    assert found.files == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (one, both)}
    monkeypatch.chdir(tmp_path)
    assert load(["mine.py"]) == load([one])
    assert load([]) == UserMethods((), {})
    monkeypatch.syspath_prepend(str(tmp_path))
    again = load(["both"])
    assert [method.name for method in again.methods] == ["x"] and list(again.files) == ["both"]
    del sys.modules["both"]


def test_a_file_is_run_once_and_again_where_it_has_changed(file):
    """Counting, in the file itself: the classes of one file must be the same, or equal configurations were not."""
    path = file(MINE.format("one") + "print('ran')\n")
    assert load([path]).methods[0] is load([path]).methods[0]
    config = load_config(None, ["sparsifier=one"], methods=load([path]).methods)
    assert config == load_config(None, ["sparsifier=one"], methods=load([path]).methods)
    other = load([file(MINE.format("other"))])
    assert [method.name for method in other.methods] == ["other"]


def test_options_whose_types_are_text_are_read_as_strictly(file):
    """Oracle: the messages; `from __future__ import annotations` leaves the types of the fields as text."""
    methods = load([file(MINE.format("one"))]).methods
    found = load_config(None, ["sparsifier={name: one, share: 1}"], methods=methods).sparsifier
    assert found.share == 1.0 and type(found.share) is float
    with pytest.raises(ConfigError, match=r"sparsifier.share must be a finite number, got 'all'"):
        load_config(None, ["sparsifier={name: one, share: all}"], methods=methods)
    with pytest.raises(ConfigError, match=r"sparsifier.length must be an integer, got 1.5"):
        load_config(None, ["sparsifier={name: one, length: 1.5}"], methods=methods)


# The oracle of each row is the specification: one line that names the file, the line and what went wrong.
MISTAKES = {
    "empty": ("", "must hold METHOD, a fedjax_lora.methods.Method, or METHODS, a sequence of them, got neither"),
    "no method": ("METHOD = 3\n", "must hold fedjax_lora.methods.Method alone, got 3"),
    "no methods": ("METHODS = {'a': 3}\n", "must hold fedjax_lora.methods.Method alone, got {'a': 3}"),
    "syntax": ("x = 1\ny = (\n", " line 2 must run, got SyntaxError: '(' was never closed"),
    "error": ("x = 1\n\nraise RuntimeError('two\\nlines')\n", " line 3 must run, got RuntimeError: two lines"),
    "missing name": ("\nx = y\n", " line 2 must run, got NameError: name 'y' is not defined"),
    "missing module": ("import nowhere_at_all\n", " line 1 must run, got ModuleNotFoundError: No module named"),
    "deeper": ("import json\n\njson.loads('{')\n", " line 3 must run, got JSONDecodeError: "),
    "exit": ("import sys\nsys.exit(3)\n", " line 2 must run, got SystemExit: 3"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_file_of_methods_is_one_line(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert "\n" not in str(caught.value)
    assert path in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py", "methods none.py must be a Python file that can be read, got No such file or directory"),
        ("./none", "methods ./none must be a Python file that can be read, got No such file or directory"),
        ("nowhere_at_all", "must run, got ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("", "must run, got ValueError: Empty module name"),
    ],
)
def test_what_is_not_there_is_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load([name])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_python_is_not_run(file):
    with pytest.raises(ConfigError, match=r"must be a file that ends in .py, got methods.txt"):
        load([file("METHOD = 1", "methods.txt")])
