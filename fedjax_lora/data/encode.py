"""From tables of texts to the arrays of examples, by what is learned of them."""

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_lora.core.errors import ConfigWarning
from fedjax_lora.core.learning import Learned
from fedjax_lora.core.types import IGNORED
from fedjax_lora.data import tables
from fedjax_lora.data.arrays import Pool
from fedjax_lora.data.examples import Examples, gather
from fedjax_lora.data.tables import Columns, Table
from fedjax_lora.data.texts import Row, Template, Tokens, prompt_text
from fedjax_lora.data.tokens import Cache

_TENTHS = 10


class _Encoded(NamedTuple):
    """Arrays of the training and the test pool, names of labels or of words' targets, and how many texts were cut."""

    pools: list[Pool]
    class_names: tuple[str, ...]
    truncated: int


def encode(
    name: str,
    parts: Sequence[Table],
    columns: Columns,
    learns: Learned,
    cache: Cache,
    max_length: int,
    template: Template = "instruction",
) -> Examples:
    """Examples of text, padded on the right to `max_length`.

    All hold `input_ids` and `attention_mask`, `[N, max_length]` int32, `token_type_ids` where two texts are compared
    and the tokenizer tells them apart, and `label: [N]` int32, which partitions go by.

    `label`: the label is the class.
    `number`: `target: [N]` float32; the label is its tenth among the training targets.
    `token_label`: `target: [N, S]` int32, the label at the first token of each word, -100 elsewhere; the label is the
      most frequent one of an example's words that is not the most frequent of all, or 0.
    `next_token`: `target: [N, S]` int32, the next token where that is of the response or ends it, of any where there is
      no prompt, -100 elsewhere; the label is that of the column, or 0.

    Args:
      name: of the source.
      parts: tables of training and of testing.
      columns, max_length, template: see `options.FilesConfig`.
      learns: see above.
      cache: of the tokenizer.

    Raises:
      ValueError: a column is missing, a value is not what it must be, whose line it names, or no example has a token to
        learn. Where some have none, a ConfigWarning says how many.
    """
    found = tables.find(parts[0], columns, learns)
    train = tables.by_role(parts[0], found)
    test = tables.by_role(parts[1], {role: column for role, column in found.items() if role != "client"})
    result = _ENCODERS[learns](train, test, cache, max_length, template)
    clients, client_names = _clients(train)
    guessed = ", ".join(f"{role} is {column!r}" for role, column in found.items() if role not in columns.given())
    return gather(
        name,
        result.pools[0],
        result.pools[1],
        result.class_names,
        truncated=result.truncated,
        tokenizer_hash=cache.tokenizer_hash,
        clients=clients,
        client_names=client_names,
        columns=found,
        notes=(
            *([f"columns by their names: {guessed}"] if guessed else []),
            *_empty(train, test),
            *cache.notes,
        ),
    )


def inputs(table: Table, learns: Learned, cache: Cache, max_length: int, template: Template = "instruction") -> Tokens:
    """What a model reads of examples whose labels are not known, of columns by their roles: see `texts.Tokens`.

    Raises:
      ValueError: a value is not what it must be; names its line.
    """
    if learns == "token_label":
        return cache.tokenize("words", words_of(table), table, max_length)
    if learns == "next_token":
        return cache.tokenize("continued", _continued(table, template), table, max_length)
    return _sentences(table, cache, max_length)


def _label(train: Table, test: Table, cache: Cache, max_length: int, _: Template) -> _Encoded:
    names = tables.class_names(train, test)
    tokens = [_sentences(table, cache, max_length) for table in (train, test)]
    pools = [
        {**own.arrays, "label": _ids(tables.labels(table), names)}
        for table, own in zip((train, test), tokens, strict=True)
    ]
    return _Encoded(pools, names, _cut(tokens))


def _number(train: Table, test: Table, cache: Cache, max_length: int, _: Template) -> _Encoded:
    targets = [np.asarray(tables.numbers(table), np.float32) for table in (train, test)]
    edges = _tenths(targets[0])
    if not edges.size:
        raise ValueError(f"{train.name}: must hold at least 2 different numbers, got only {targets[0][0]}")
    tokens = [_sentences(table, cache, max_length) for table in (train, test)]
    pools = [
        {**own.arrays, "target": target, "label": np.searchsorted(edges, target, side="right").astype(np.int32)}
        for target, own in zip(targets, tokens, strict=True)
    ]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return _Encoded(pools, (f"below {edges[0]}", *between, f"from {edges[-1]}"), _cut(tokens))


def _tenths(target: np.ndarray) -> np.ndarray:
    """The least number of each tenth above the first: fewer than nine where tenths are of one number."""
    above = target[target > target.min()]
    edges = np.unique(np.quantile(target, np.arange(1, _TENTHS) / _TENTHS, method="higher"))
    edges = edges[edges > target.min()]
    return edges if edges.size else np.unique(above)[:1]


def _token_label(train: Table, test: Table, cache: Cache, max_length: int, _: Template) -> _Encoded:
    words = [words_of(table) for table in (train, test)]
    tags = [_tags(table, own) for table, own in zip((train, test), words, strict=True)]
    names = _tag_names(train, test, tags)
    commonest = np.bincount(_ids([tag for row in tags[0] for tag in row], names)).argmax()
    pools, tokens = [], []
    for table, own, rows in zip((train, test), words, tags, strict=True):
        tokens.append(cache.tokenize("words", own, table, max_length))
        ids = [_ids(row, names) for row in rows]
        arrays = dict(tokens[-1].arrays)
        word = arrays.pop("word")
        target = np.full_like(word, IGNORED)
        for i, row in enumerate(ids):
            begins = word[i] >= 0
            target[i, begins] = row[word[i, begins]]
        label = [np.bincount(row[row != commonest], minlength=1).argmax() for row in ids]
        pools.append({**arrays, "target": target, "label": np.asarray(label, np.int32)})
    return _Encoded(pools, names, _cut(tokens))


def _next_token(train: Table, test: Table, cache: Cache, max_length: int, template: Template) -> _Encoded:
    labelled = "label" in train.columns
    names = tables.class_names(train, test) if labelled else ("all",)
    pools, tokens = [], []
    for table in (train, test):
        rows = _continued(table, template)
        own = cache.tokenize("continued", rows, table, max_length)
        label = _ids(tables.labels(table), names) if labelled else np.zeros(len(rows), np.int32)
        pools.append({**own.arrays, "label": label})
        tokens.append(own)
        _check_learned(table, own.arrays["target"], max_length)
    return _Encoded(pools, names, _cut(tokens))


def _check_learned(table: Table, target: np.ndarray, max_length: int) -> None:
    """Warn of examples in which no token is to be learned; raise ValueError where all are such."""
    empty, number = int((target == IGNORED).all(axis=1).sum()), len(target)
    why = f"prompts that fill data.max_length = {max_length} tokens" if "prompt" in table.columns else "empty texts"
    if empty == number:
        raise ValueError(f"{table.name}: must hold an example with a token to learn, got {number} with none: {why}")
    if empty:
        warnings.warn(f"{table.name}: no token is learned of {empty} of {number} examples: {why}", ConfigWarning, 2)


_ENCODERS = {"label": _label, "number": _number, "token_label": _token_label, "next_token": _next_token}


def _sentences(table: Table, cache: Cache, max_length: int) -> Tokens:
    parts = [tables.texts(table, role) for role in ("text", "text_pair") if role in table.columns]
    return cache.tokenize("sentences", list(zip(*parts, strict=True)), table, max_length)


def _empty(*parts: Table) -> list[str]:
    """How many texts are empty, where some are."""
    counts = {
        (table.name, role): sum(not text.strip() for text in table.columns[role])
        for table in parts
        for role in ("text", "text_pair", "prompt", "response")
        if role in table.columns
    }
    return [f"{name}: {role} is empty in {count} examples" for (name, role), count in counts.items() if count]


def _continued(table: Table, template: Template) -> list[Row]:
    """A prompt and a response in each row, or a text."""
    if "text" in table.columns:
        return [(text,) for text in tables.texts(table, "text")]
    prompts, responses = (tables.texts(table, role) for role in ("prompt", "response"))
    contexts = tables.texts(table, "context", optional=True) if "context" in table.columns else [""] * len(prompts)
    asked = [prompt_text(template, *both) for both in zip(prompts, contexts, strict=True)]
    return list(zip(asked, responses, strict=True))


def words_of(table: Table) -> list[Row]:
    """The words of each example: a list, or a text that is split at spaces.

    Raises:
      ValueError: a value is neither; names its line.
    """
    found: list[Row] = []
    for row, value in enumerate(table.columns["words"]):
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"{table.at(row)}: words must be a list of words, got {tables.shorten(value)}")
        found.append(words)
    return found


def _tags(table: Table, words: list[Row]) -> list[list[str]]:
    """The label of each word."""
    found = []
    for row, value in enumerate(table.columns["label"]):
        tags = value.split() if isinstance(value, str) else value
        if not isinstance(tags, list) or len(tags) != len(words[row]):
            got = len(tags) if isinstance(tags, list) else tables.shorten(value)
            raise ValueError(f"{table.at(row)}: label must be one for each of {len(words[row])} words, got {got}")
        found.append([tables.word(tag, table.classes.get("label"), table, row) for tag in tags])
    return found


def _tag_names(train: Table, test: Table, tags: list[list[list[str]]]) -> tuple[str, ...]:
    """The labels of words, as `tables.class_names` has those of texts."""
    names = train.classes.get("label") or tables.ordered(tag for row in tags[0] for tag in row)
    if len(names) < 2:
        raise ValueError(f"{train.name}: must hold at least 2 labels, got only {', '.join(map(repr, names))}")
    known = set(names)
    for place, row in enumerate(tags[1]):
        tables.check_known(test, place, row, known)
    return names


def _clients(train: Table) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Who holds each example, where a column says so."""
    if "client" not in train.columns:
        return None, ()
    words = tables.labels(train, "client")
    names = tables.ordered(words)
    return _ids(words, names), names


def _ids(words: Sequence[str], names: Sequence[str]) -> np.ndarray:
    ids = {name: label for label, name in enumerate(names)}
    return np.asarray([ids[word] for word in words], np.int32)


def _cut(tokens: list[Tokens]) -> int:
    return sum(own.truncated for own in tokens)
