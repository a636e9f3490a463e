"""Files of labelled sentences: `sentence<TAB>label`, UTF-8, one example a line, with or without a known header."""

from fedjax_lora.data.readers import read_text
from fedjax_lora.data.tables import LABEL_NAMES, TEXT_NAMES, Table, shorten

_TEXT_COLUMNS, _LABEL_COLUMNS = set(TEXT_NAMES), set(LABEL_NAMES)
_OTHER_COLUMNS = {"id", "idx", "index", "sentence1", "sentence2", "title"}
_AROUND = " \r\"'"  # what may stand around a column's name


def read(path: str, field: str) -> Table:
    """Reads one file; `field` names it in messages.

    Blank lines are skipped, and so is a header: a first line whose two fields are known names of columns, such as
    `text<TAB>label`, or whose second is a known name of a label's column and no other line's label. The label stands
    after a line's last tab, so a sentence may hold tabs.

    Raises:
      ValueError: the file is missing, empty or not UTF-8, has a header of other columns or what may be one, or a line
        has no sentence or no label.
    """
    text, name = read_text(path, field), f"{field} {path}"
    # not str.splitlines: it also breaks at characters that a sentence may hold
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and _has_header(lines, name):
        del lines[0]
    sentences, labels = [], []
    for number, line in lines:
        sentence, _, label = (part.strip() for part in line.rpartition("\t"))
        if not sentence or not label:
            raise ValueError(f"{name}, line {number}: must be sentence<TAB>label, got {shorten(line)}")
        sentences.append(sentence)
        labels.append(label)
    if not sentences:
        raise ValueError(f"{field} must hold at least one sentence<TAB>label line, got none in {path}")
    return Table(name, {"text": sentences, "label": labels}, [number for number, _ in lines])


def names_columns(path: str, field: str) -> bool:
    """Whether the first line of a file names the column of its texts, and not a sentence and its label.

    Raises:
      ValueError: the file is missing or not UTF-8.
    """
    lines = [line for line in read_text(path, field).split("\n") if line.strip()]
    first, *others = [[_column(part) for part in line.split("\t")] for line in lines] or [[""]]
    return not _TEXT_COLUMNS.isdisjoint(first) and first[-1] not in {fields[-1] for fields in others}


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
