"""Files of tables: CSV, JSON lines and Parquet, each a table with the columns that its file names."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fedjax_lora.core.errors import reason_of
from fedjax_lora.data.tables import Table, shorten, shorten_list

Format = Literal["csv", "jsonl", "parquet"]

_LONGEST_FIELD = 2**31 - 1
"""Characters of a field of a CSV file: the longest that the parser knows, since it allows 131,072 by itself."""


def read(form: Format, path: str, field: str, delimiter: str = ",") -> Table:
    """Reads one file; `field` names it in messages, `delimiter` parts the fields of a CSV file.

    Raises:
      ValueError: the file is missing, empty or damaged; names its line where it has lines.
    """
    if form == "csv":
        return _csv(read_text(path, field), path, field, delimiter)
    return _jsonl(read_text(path, field), path, field) if form == "jsonl" else _parquet(path, field)


def by_suffix(path: str, field: str, delimiter: str = ",") -> Table | None:
    """Reads a file of columns, whose format is that of its name: CSV, TSV with a header, JSON lines or Parquet.

    None for a name that ends otherwise. `delimiter` parts the fields of CSV; where it is a tab, a TSV file is CSV too.

    Raises:
      ValueError: as of `read`.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".tsv" and delimiter == "\t":
        return read("csv", path, field, delimiter)
    if suffix == ".tsv":
        return _tsv(read_text(path, field), f"{field} {path}")
    form: Format | None = next((known for known in get_args(Format) if suffix == f".{known}"), None)
    return None if form is None else read(form, path, field, delimiter)


def _tsv(text: str, name: str) -> Table:
    """A header and rows whose fields tabs part, without quotes; blank lines are skipped."""
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"{name}: must hold a header and at least one row, got {len(lines)} lines")
    header, rows = lines[0][1].split("\t"), [(number, line.split("\t")) for number, line in lines[1:]]
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{name}, line {number}: must have {len(header)} fields, as line 1 has, got {len(row)}")
    columns = zip(*(row for _, row in rows), strict=True)
    return Table(name, dict(zip(header, columns, strict=True)), [number for number, _ in rows])


def read_text(path: str, field: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
      ValueError: the file cannot be read, or is not UTF-8.
    """
    content = _read_bytes(path, field)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{field} {path}, line {line}: must be UTF-8, got {error.object[error.start]:#04x}") from None


def _read_bytes(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ValueError(f"{field} must be a file that can be read, got {path}: {reason_of(error)}") from None


def _csv(text: str, path: str, field: str, delimiter: str) -> Table:
    """A header and rows, quoted as RFC 4180 has it; blank lines are skipped."""
    name, rows = f"{field} {path}", []
    limit = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 1
    try:
        for row in reader:
            if row:
                rows.append((first, row))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}, line {first}: must be CSV, got {reason_of(error)}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{field} must hold a header and at least one row, got none in {path}")
    (line, header), *rows = rows
    if len(set(header)) < len(header) or not all(header):
        raise ValueError(f"{name}, line {line}: must name each column once, got {shorten(delimiter.join(header))}")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{name}, line {line}: must have {len(header)} fields, as the header has, got {len(row)}")
    if not rows:
        raise ValueError(f"{field} must hold at least one row below the header, got none in {path}")
    columns = zip(*(row for _, row in rows), strict=True)
    return Table(name, dict(zip(header, columns, strict=True)), [line for line, _ in rows])


def _jsonl(text: str, path: str, field: str) -> Table:
    """An object in each line; what one lacks of the others' keys is None."""
    name, lines, rows = f"{field} {path}", [], []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {line}: must be a JSON object, got {reason_of(error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}, line {line}: must be a JSON object, got {shorten(row)}")
        lines.append(line)
        rows.append(row)
    if not rows:
        raise ValueError(f"{field} must hold at least one JSON object, got none in {path}")
    names = dict.fromkeys(key for row in rows for key in row)
    return Table(name, {key: [row.get(key) for row in rows] for key in names}, lines)


def _parquet(path: str, field: str) -> Table:
    try:
        import pyarrow.parquet  # of an extra, and slow to import
    except ImportError:
        raise missing_library("parquet", "pyarrow") from None
    content = io.BytesIO(_read_bytes(path, field))
    try:
        table = pyarrow.parquet.read_table(content)
        columns: dict[str, Sequence[Any]] = table.to_pydict()
    except Exception as error:  # those of another library
        raise ValueError(f"{field} must be a Parquet file, got {path}: {reason_of(error)}") from None
    if not table.num_rows:
        raise ValueError(f"{field} must hold at least one row, got none in {path} with {shorten_list(columns)}")
    return Table(f"{field} {path}", columns, range(1, table.num_rows + 1), "row")


def missing_library(source: str, library: str) -> ValueError:
    """What to say where a library of an extra is not installed."""
    return ValueError(
        f"data.source must be another than {source} where {library} is not installed; it is after "
        "pip install 'fedjax-lora[data]'"
    )
