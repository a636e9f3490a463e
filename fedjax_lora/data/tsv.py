"""Files of labelled sentences: `sentence<TAB>label`, UTF-8, one example a line, with or without a known header."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from fedjax_lora.core.errors import reason_of

_TEXT_COLUMNS = {"sentence", "text", "review", "content", "comment", "tweet", "message", "document", "phrase"}
_TEXT_COLUMNS |= {"headline", "question", "utterance", "query"}
_LABEL_COLUMNS = {"label", "labels", "class", "target", "sentiment", "category", "polarity"}
_LABEL_COLUMNS |= {"intent", "score", "rating", "emotion", "topic"}
_OTHER_COLUMNS = {"id", "idx", "index", "sentence1", "sentence2", "title"}
_AROUND = " \r\"'"  # what may stand around a column's name


class Table(NamedTuple):
    """A file's examples, in its order.

    name: field and path of the file, for messages.
    sentences, labels: text of each example.
    lines: line number of each example, counted from 1.
    sha256: of the file's bytes.
    """

    name: str
    sentences: list[str]
    labels: list[str]
    lines: list[int]
    sha256: str


def read(path: str, field: str) -> Table:
    """Reads one file; `field` names it in messages.

    Blank lines are skipped, and so is a header: a first line whose two fields are known names of columns, such as
    `text<TAB>label`, or whose second is a known name of a label's column and no other line's label. The label stands
    after a line's last tab, so a sentence may hold tabs.

    Raises:
      ValueError: the file is missing, empty or not UTF-8, has a header of other columns or what may be one, or a line
        has no sentence or no label.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ValueError(f"{field} must be a file that can be read, got {path}: {reason_of(error)}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{field} {path}, line {line}: must be UTF-8, got {error.object[error.start]:#04x}") from None
    table = Table(f"{field} {path}", [], [], [], hashlib.sha256(content).hexdigest())
    # not str.splitlines: it also breaks at characters that a sentence may hold
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and _has_header(lines, table.name):
        del lines[0]
    for number, line in lines:
        sentence, _, label = (part.strip() for part in line.rpartition("\t"))
        if not sentence or not label:
            raise ValueError(f"{table.name}, line {number}: must be sentence<TAB>label, got {shorten(line)}")
        table.sentences.append(sentence)
        table.labels.append(label)
        table.lines.append(number)
    if not table.sentences:
        raise ValueError(f"{field} must hold at least one sentence<TAB>label line, got none in {path}")
    return table


def class_names(train: Table, test: Table) -> tuple[str, ...]:
    """The labels of `train` in order: by value where all are numbers, else by their text.

    Raises:
      ValueError: there are fewer than two labels, or `test` holds one that `train` does not.
    """
    known = set(train.labels)
    if len(known) < 2:
        raise ValueError(f"{train.name}: must hold at least 2 labels, got only {train.labels[0]!r}")
    for label, number in zip(test.labels, test.lines, strict=True):
        if label not in known:
            allowed = shorten(", ".join(sorted(known)))
            raise ValueError(f"{test.name}, line {number}: must be a label of data.train, {allowed}, got {label!r}")
    by_text = sorted(known)
    try:
        return tuple(sorted(by_text, key=float))
    except ValueError:
        return tuple(by_text)


def _has_header(lines: list[tuple[int, str]], name: str) -> bool:
    """Whether the first line names the two columns.

    Raises:
      ValueError: it names others, or these the other way round; or it looks like a header, but by no known name.
    """
    number, first = lines[0]
    fields = [_column(field) for field in first.split("\t")]
    others = {_column(line.rpartition("\t")[2]) for _, line in lines[1:]}
    if len(fields) == 1 or (fields[-1] in others and not _names_columns(fields)):
        return False
    if fields[-1] in _LABEL_COLUMNS and len(fields) == 2:
        return True
    if fields[-1] in _LABEL_COLUMNS or _names_columns(fields):
        raise ValueError(f"{name}, line {number}: must be sentence<TAB>label, got the header {shorten(first)}")
    if others and not _is_integer(fields[-1]) and all(map(_is_integer, others)):
        raise ValueError(
            f"{name}, line {number}: must have an integer as its label, as all other lines do, got {shorten(first)}, "
            "which looks like a header: remove it"
        )
    return False


def _column(field: str) -> str:
    """A field as a column's name would be compared: without quotes and a leading `#`, in small letters."""
    return field.strip(_AROUND).lstrip("#").strip(_AROUND).lower()


def _names_columns(fields: list[str]) -> bool:
    """Whether all fields are known names of columns, a sentence's and a label's among them."""
    known = set(fields) <= _TEXT_COLUMNS | _LABEL_COLUMNS | _OTHER_COLUMNS
    return known and not _LABEL_COLUMNS.isdisjoint(fields) and not _LABEL_COLUMNS.issuperset(fields)


def _is_integer(label: str) -> bool:
    try:
        int(label)
    except ValueError:
        return False
    return True


def shorten(line: str, width: int = 60) -> str:
    """`line` in quotes, cut to `width` characters."""
    return repr(line if len(line) <= width else line[:width] + "...")
