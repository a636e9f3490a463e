"""Files of labelled sentences: `sentence<TAB>label`, UTF-8, one example a line, no header."""

import hashlib
from pathlib import Path
from typing import NamedTuple

_GLUE_HEADER = ("sentence", "label")


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

    Blank lines are skipped. The label stands after a line's last tab, so a sentence may hold tabs.

    Raises:
      ValueError: the file is missing, empty or not UTF-8, has GLUE's header, or a line has no sentence or no label.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{field} must be a file that can be read, got {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{field} {path}, line {line}: must be UTF-8, got {error.object[error.start]:#04x}") from None
    table = Table(f"{field} {path}", [], [], [], hashlib.sha256(content).hexdigest())
    # not str.splitlines: it also breaks at characters that a sentence may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        sentence, _, label = (part.strip() for part in line.rpartition("\t"))
        if not sentence or not label:
            raise ValueError(f"{table.name}, line {number}: must be sentence<TAB>label, got {_shorten(line)}")
        if not table.sentences and (sentence, label) == _GLUE_HEADER:
            raise ValueError(
                f"{table.name}, line {number}: must be sentence<TAB>label, got the header {_shorten(line)}"
            )
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
            allowed = _shorten(", ".join(sorted(known)))
            raise ValueError(f"{test.name}, line {number}: must be a label of data.train, {allowed}, got {label!r}")
    by_text = sorted(known)
    try:
        return tuple(sorted(by_text, key=float))
    except ValueError:
        return tuple(by_text)


def _shorten(line: str, width: int = 60) -> str:
    return repr(line if len(line) <= width else line[:width] + "...")
