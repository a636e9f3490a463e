"""Files of tables: the same rows in each format are the same examples; each kind of bad file is one line."""

import csv
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from fedjax_lora.data import readers
from fedjax_lora.data.options import FilesConfig

ROWS = [
    {"text": 'a "quoted" film, so\nlong', "label": "good", "number": "1"},
    {"text": "bad; \t and a", "label": "bad, and long", "number": "2"},
    {"text": "é\u2028", "label": "x", "number": "3"},
]


def as_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_jsonl(path):
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("form", "write", "delimiter", "lines"),
    [
        ("csv", as_csv, ",", [2, 4, 5]),
        ("csv", lambda path: as_csv(path, ";"), ";", [2, 4, 5]),
        ("jsonl", as_jsonl, ",", [1, 3, 5]),
        ("parquet", as_parquet, ",", [1, 2, 3]),
    ],
)
def test_rows_are_what_was_written_invariance(tmp_path, form, write, delimiter, lines):
    """Conservation: line breaks, quotes, delimiters and other alphabets in a field come back; lines are by hand."""
    write(tmp_path / "rows")
    table = readers.read(form, str(tmp_path / "rows"), "data.train", delimiter)
    assert {name: list(column) for name, column in table.columns.items()} == {
        name: [row[name] for row in ROWS] for name in ROWS[0]
    }
    assert list(table.lines) == lines
    assert table.at(1) == f"data.train {tmp_path / 'rows'}, {'row' if form == 'parquet' else 'line'} {lines[1]}"


def test_json_keeps_numbers_and_what_a_line_lacks_is_none(tmp_path):
    (tmp_path / "rows").write_text('{"text": "a", "label": 1}\n{"label": true, "words": ["b"]}\n')
    columns = readers.read("jsonl", str(tmp_path / "rows"), "data.train").columns
    assert columns == {"text": ["a", None], "label": [1, True], "words": [None, ["b"]]}


def test_a_field_longer_than_python_allows_by_itself_is_read(tmp_path):
    text = "long " * 40_000
    (tmp_path / "rows").write_text(f"text,label\n{text},1\n")
    before = csv.field_size_limit()
    assert list(readers.read("csv", str(tmp_path / "rows"), "data.train").columns["text"]) == [text]
    assert csv.field_size_limit() == before < len(text)


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("csv", b"", "data.train must hold a header and at least one row, got none in "),
        ("csv", b"text,label\n\n", "data.train must hold at least one row below the header, got none in "),
        ("csv", b"text,label\na,b\nc\n", "rows, line 3: must have 2 fields, as the header has, got 1"),
        ("csv", b'text,label\n"a\nb",c\nd,e,f\n', "rows, line 4: must have 2 fields, as the header has, got 3"),
        ("csv", b'text,label\na,b\n"c\n,d\n', "rows, line 3: must be CSV, got unexpected end of data"),
        ("csv", b'text,label\n"a"b,c\n', "rows, line 2: must be CSV, got ',' expected after '\"'"),
        ("csv", b"text,text\na,b\n", "rows, line 1: must name each column once, got 'text,text'"),
        ("csv", b"text,label\na\xff,b\n", "rows, line 2: must be UTF-8, got 0xff"),
        ("jsonl", b"\n \n", "data.train must hold at least one JSON object, got none in "),
        ("jsonl", b'{"a": 1}\n{"a": \n', "rows, line 2: must be a JSON object, got Expecting value"),
        ("jsonl", b'{"a": 1}\n[1]\n', "rows, line 2: must be a JSON object, got [1]"),
        ("jsonl", b"[" * 100_000, "rows, line 1: must be a JSON object, got "),
        ("parquet", b"PAR1 and no more", "data.train must be a Parquet file, got "),
        ("parquet", b"", "data.train must be a Parquet file, got "),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, form, content, message):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        readers.read(form, str(tmp_path / "rows"), "data.train")
    assert message in str(caught.value) and str(caught.value).startswith("data.train ")
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows_or_a_file_that_is_missing_is_one_line(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "rows")
    with pytest.raises(ValueError, match=r"^data\.train must hold at least one row, got none in .*rows with text$"):
        readers.read("parquet", str(tmp_path / "rows"), "data.train")
    for form in ("csv", "jsonl", "parquet"):
        with pytest.raises(ValueError, match=r"^data\.test must be a file that can be read, got .*no: No such file"):
            readers.read(form, str(tmp_path / "no"), "data.test")


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    as_parquet(tmp_path / "rows")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pyarrow is not installed; it is after pip install 'fedjax-lora\[data\]'$"):
        readers.read("parquet", str(tmp_path / "rows"), "data.train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": None}, r"^train must be the path of a file when source is csv, got None$"),
        ({"test": ""}, r"^test must be the path of a file when source is csv, got ''$"),
        ({"delimiter": "tab"}, r"^delimiter must be one character, and no quote or line break, got 'tab'$"),
        ({"template": "chat"}, r"^template must be one of instruction, plain, got 'chat'$"),
        ({"max_length": 1}, r"^max_length must be at least 2, got 1$"),
    ],
)
def test_config_errors_name_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        FilesConfig(source="csv", **{"train": "a", "test": "b", **fields})
