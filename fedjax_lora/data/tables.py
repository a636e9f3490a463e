"""Tables of examples: columns by name, which of them is the text or the label, and what their values must be."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_lora.core.learning import Learned

_LARGEST = float(np.finfo(np.float32).max)

TEXT_NAMES = (
    *("sentence", "text", "review", "content", "comment", "tweet", "message", "document", "phrase", "headline"),
    *("question", "utterance", "query"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "target", "sentiment", "category", "polarity", "intent", "score", "rating"),
    *("emotion", "topic"),
)
PAIR_NAMES = (
    *(("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence")),
    *(("text1", "text2"), ("text", "text_pair")),
)
WORD_NAMES = ("words", "tokens")
TAG_NAMES = ("ner_tags", "pos_tags", "tags", "labels", "label")
PROMPT_NAMES = ("prompt", "instruction", "question")
CONTEXT_NAMES = ("context", "input")
RESPONSE_NAMES = ("response", "output", "completion", "answer")
CLIENT_NAMES = ("client", "client_id")


class Table(NamedTuple):
    """Examples as columns, in the order of their file.

    name: field and path of the file, for messages.
    columns: name of a column, or its role -> a value of each example.
    lines: line or row of each example, counted from 1. unit: which of the two.
    classes: column of integers that stand for words -> these words.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    unit: str = "line"
    classes: Mapping[str, tuple[str, ...]] = {}

    def at(self, row: int) -> str:
        """Where an example stands, for messages."""
        return f"{self.name}, {self.unit} {self.lines[row]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of the tables by what they hold; one that is not named here goes by the common names.

    text, text_pair: column of the text, and of the text that it is compared with.
    label: column of the label: a word or a number; of each word, for labels of words.
    words: column of lists of words, or of words that spaces part.
    prompt, context, response: columns of what is asked, of what goes with it, and of what is to be learned.
    client: column of who holds the example.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    words: str | None = None
    prompt: str | None = None
    context: str | None = None
    response: str | None = None
    client: str | None = None

    def given(self) -> dict[str, str]:
        """Role -> column, of those that are named."""
        return {role: name for role, name in vars(self).items() if name is not None}


def find(table: Table, columns: Columns, learns: Learned) -> dict[str, str]:
    """Role -> column of `table`, of the roles from which this is learned: as `columns` says, or by the common names.

    Where several columns have common names, the first of the list is taken; a pair of texts goes before one text, and
    a prompt with its response before a text alone. Of texts that are continued the label is never guessed.

    Raises:
      ValueError: a column that is named is not there, or none has a common name.
    """
    given = columns.given()
    for role, name in given.items():
        if name not in table.columns:
            raise ValueError(f"data.columns.{role} must be a column of {table.name}: {_listed(table)}, got {name!r}")
    found = {"client": given.get("client") or _first(table, CLIENT_NAMES)}
    if learns == "next_token":
        found |= _find_continued(table, given)
    elif learns == "token_label":
        found["words"] = given.get("words") or given.get("text") or _one(table, "words", WORD_NAMES + TEXT_NAMES)
        found["label"] = given.get("label") or _one(table, "label", TAG_NAMES)
    else:
        found |= _find_texts(table, given)
        found["label"] = given.get("label") or _one(table, "label", LABEL_NAMES)
    return {role: name for role, name in found.items() if name is not None}


def find_inputs(table: Table, named: Mapping[str, str], learns: Learned) -> dict[str, str]:
    """Role -> column of `table`, of what a model reads of an example whose label is not known; a response is known.

    Args:
      table: of the examples.
      named: role -> column of the training data, as far as it is known; others go by the common names.
      learns: what the model has learned.

    Raises:
      ValueError: the table lacks a column that the training data had, or none has a common name.
    """
    read = ("text", "prompt", "context", "response") if learns == "next_token" else ("text", "text_pair", "words")
    given = {role: name for role, name in named.items() if role in read}
    for name in given.values():
        if name not in table.columns:
            raise ValueError(f"{table.name}: must have a column {name!r}, as the training data, got {_listed(table)}")
    if learns == "token_label":
        return {"words": given.get("words") or given.get("text") or _one(table, "words", WORD_NAMES + TEXT_NAMES)}
    found = _find_continued(table, given) if learns == "next_token" else _find_texts(table, given)
    return {role: name for role, name in found.items() if name is not None}


def label_of(table: Table) -> str:
    """The column that by its name holds labels."""
    return _one(table, "label", LABEL_NAMES)


def by_role(table: Table, found: Mapping[str, str]) -> Table:
    """The table whose columns are these alone, by their roles.

    Raises:
      ValueError: it lacks one of them.
    """
    for name in found.values():
        if name not in table.columns:
            raise ValueError(f"{table.name}: must have a column {name!r}, as data.train has, got {_listed(table)}")
    return table._replace(
        columns={role: table.columns[name][:] for role, name in found.items()},
        classes={role: table.classes[name] for role, name in found.items() if name in table.classes},
    )


def texts(table: Table, role: str, optional: bool = False) -> list[str]:
    """The text that each example has in a role, which may be empty; an optional one may be absent, and is "" then.

    Raises:
      ValueError: a value is no text; names its line.
    """
    found = []
    for row, value in enumerate(table.columns[role]):
        if value is None and optional:
            value = ""
        if not isinstance(value, str):
            raise ValueError(f"{table.at(row)}: {role} must be text, got {shorten(value)}")
        found.append(value)
    return found


def labels(table: Table, role: str = "label") -> list[str]:
    """The name of each example's label.

    Raises:
      ValueError: a value is neither a word nor a number; names its line.
    """
    classes = table.classes.get(role)
    return [word(value, classes, table, row, role) for row, value in enumerate(table.columns[role])]


def word(value: Any, classes: Sequence[str] | None, table: Table, row: int, role: str = "label") -> str:
    """One label, which stands in this row, as a word: 2.0 is 2, true is true, and a number of a class is its name."""
    if classes is not None:
        if type(value) is not int or not 0 <= value < len(classes):
            raise ValueError(f"{table.at(row)}: {role} must be from 0 to {len(classes) - 1}, got {shorten(value)}")
        return classes[value]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise ValueError(f"{table.at(row)}: {role} must be a word or a finite number, got {shorten(value)}")


def numbers(table: Table, role: str = "label") -> list[float]:
    """The number that each example has.

    Raises:
      ValueError: a value is no finite number; names its line.
    """
    found = []
    for row, value in enumerate(table.columns[role]):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise ValueError(f"{table.at(row)}: {role} must be a finite number, got {shorten(value)}")
        found.append(number)
    return found


def class_names(train: Table, test: Table) -> tuple[str, ...]:
    """The labels of `train` in order: that of its classes, or by value where all are numbers, else by their text.

    Raises:
      ValueError: there are fewer than two labels, or `test` holds one that `train` does not.
    """
    of_train = labels(train)
    names = train.classes.get("label") or ordered(of_train)
    if len(names) < 2:
        raise ValueError(f"{train.name}: must hold at least 2 labels, got only {', '.join(map(repr, names))}")
    known = set(names)
    for row, label in enumerate(labels(test)):
        check_known(test, row, [label], known)
    return names


def check_known(test: Table, row: int, found: Iterable[str], known: set[str]) -> None:
    """Raise ValueError where a row of `test` has a label that `train` does not have."""
    for label in found:
        if label not in known:
            allowed = shorten(", ".join(sorted(known)))
            raise ValueError(f"{test.at(row)}: must be a label of data.train, {allowed}, got {label!r}")


def ordered(words: Iterable[str]) -> tuple[str, ...]:
    """Different words, by value where all are numbers, else by their text."""
    by_text = sorted(set(words))
    try:
        return tuple(sorted(by_text, key=float))
    except ValueError:
        return tuple(by_text)


def shorten(value: Any, width: int = 60) -> str:
    """`value` as it would be written in a program, a text cut to `width` characters."""
    line = value if isinstance(value, str) else repr(value)
    short = line if len(line) <= width else line[:width] + "..."
    return repr(short) if isinstance(value, str) else short


def _find_continued(table: Table, given: Mapping[str, str]) -> dict[str, str | None]:
    """The roles of texts that are continued."""
    asked = [role for role in ("prompt", "response") if role in given]
    if asked and "text" in given:
        raise ValueError(
            f"data.columns.text must be absent where data.columns.{asked[0]} is given, got {given['text']!r}"
        )
    prompt = given.get("prompt") or _first(table, PROMPT_NAMES)
    response = given.get("response") or _first(table, RESPONSE_NAMES)
    label = given.get("label")
    if "text" not in given and (asked or (prompt and response)):
        prompt = prompt or _one(table, "prompt", PROMPT_NAMES)
        response = response or _one(table, "response", RESPONSE_NAMES)
        context = given.get("context") or _first(table, [name for name in CONTEXT_NAMES if name != prompt])
        return {"prompt": prompt, "context": context, "response": response, "label": label}
    return {"text": given.get("text") or _one(table, "text", TEXT_NAMES), "label": label}


def _find_texts(table: Table, given: Mapping[str, str]) -> dict[str, str | None]:
    """The roles of a text, or of two that are compared."""
    if "text" in given or "text_pair" in given:
        return {"text": given.get("text") or _one(table, "text", TEXT_NAMES), "text_pair": given.get("text_pair")}
    for pair in PAIR_NAMES:
        first, second = (_first(table, (name,)) for name in pair)
        if first and second:
            return {"text": first, "text_pair": second}
    return {"text": _one(table, "text", TEXT_NAMES)}


def _one(table: Table, role: str, names: Sequence[str]) -> str:
    found = _first(table, names)
    if found is None:
        raise ValueError(
            f"{table.name}: must have a column of {role} that is called {', '.join(names)}, or that "
            f"data.columns.{role} names, got {_listed(table)}{_continues(table)}"
        )
    return found


def _continues(table: Table) -> str:
    """What to do with a table of prompts and responses, for messages."""
    asked = [_first(table, names) for names in (PROMPT_NAMES, RESPONSE_NAMES)]
    return f"; task=causal_lm learns {asked[1]!r} after {asked[0]!r}" if all(asked) else ""


def _first(table: Table, names: Sequence[str]) -> str | None:
    """The column whose name is first in `names`, whatever its capitals."""
    by_name = {name.strip().lower(): name for name in reversed(list(table.columns))}
    return next((by_name[name] for name in names if name in by_name), None)


def _listed(table: Table) -> str:
    return shorten_list(table.columns)


def shorten_list(names: Iterable[str]) -> str:
    """Names with commas, the first twenty of them."""
    listed = list(names)
    return ", ".join(map(str, listed[:20])) + (", ..." if len(listed) > 20 else "") if listed else "none"
