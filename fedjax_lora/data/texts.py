"""Texts to token ids: sentences and pairs of them, words that are labelled, and texts that are continued."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fedjax_lora.core.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sentences", "words", "continued"]
Template = Literal["instruction", "plain"]

Row = Sequence[str]
"""Of `sentences`: a text, or two that are compared. Of `words`: any number of words. Of `continued`: a prompt and its
response, or a text alone."""

_FILL = {"word": -1, "target": IGNORED}


class Tokens(NamedTuple):
    """Tokenised texts, padded on the right.

    arrays: `input_ids` and `attention_mask`; of pairs `token_type_ids`, where the tokenizer tells two texts apart; of
      words `word`, the number of the word that begins at a position, else -1; of continued texts `target`, the next
      token where it is to be learned, else -100. All are `[N, max_length]` int32.
    truncated: texts that were longer than `max_length` tokens.
    """

    arrays: dict[str, np.ndarray]
    truncated: int


def tokenize(tokenizer: "PreTrainedTokenizerBase", kind: Kind, rows: Sequence[Row], max_length: int) -> Tokens:
    """Ids and mask of each row, special tokens included.

    Padding is on the right whatever the tokenizer prefers, and its positions are masked: a tokenizer without a padding
    token, as GPT-2's, fills them with the token that ends a text, which also stands for an empty one. Texts that are
    continued need that token.
    """
    if kind == "continued":
        return _continued(tokenizer, rows, max_length)
    words = kind == "words"

    def encode(chosen: Sequence[Row], **more: Any) -> Any:
        first, *second = [list(map(list, chosen))] if words else map(list, zip(*chosen, strict=True))
        given: Any = {"text": first, "text_pair": second[0] if second else None, "is_split_into_words": words}
        return tokenizer(**given, **more)

    whole = encode(rows, verbose=False)
    long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
    # cut by the tokenizer, which keeps its closing token
    cut = encode([rows[i] for i in long], truncation=True, max_length=max_length) if long else None
    found = [(whole, i) for i in range(len(rows))]
    for place, i in enumerate(long):
        found[i] = (cut, place)
    columns = {"input_ids": [encoded["input_ids"][i] or _of_nothing(tokenizer, rows[i]) for encoded, i in found]}
    if kind == "sentences" and len(rows[0]) == 2 and "token_type_ids" in whole:
        columns["token_type_ids"] = [encoded["token_type_ids"][i] for encoded, i in found]
    if words:
        columns["word"] = [_first_of_word(encoded.word_ids(i)) for encoded, i in found]
    return Tokens(_padded(tokenizer, columns, max_length), len(long))


def _of_nothing(tokenizer: "PreTrainedTokenizerBase", row: Row) -> list[int]:
    """Ids of a row without a token: of an empty text the token that ends one, where there is such."""
    end: Any = tokenizer.eos_token_id
    return [] if "".join(row).strip() or end is None else [end]


def prompt_text(template: Template, prompt: str, context: str) -> str:
    """What a response continues.

    `instruction`: headings, as models that follow instructions are often tuned with:

        ### Instruction:
        {prompt}

        ### Input:
        {context}

        ### Response:

    without the second where there is no context. `plain`: prompt and context as they are, each with a line break.
    """
    if template == "plain":
        return "".join(f"{text}\n" for text in (prompt, context) if text)
    parts = {"Instruction": prompt, "Input": context}
    return "".join(f"### {head}:\n{text}\n\n" for head, text in parts.items() if text) + "### Response:\n"


def _first_of_word(word_ids: Sequence[int | None]) -> list[int]:
    """The number of the word that begins at each position, -1 elsewhere."""
    before = [None, *word_ids[:-1]]
    return [-1 if word is None or word == last else word for word, last in zip(word_ids, before, strict=True)]


def _continued(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int) -> Tokens:
    """The last text of each row is learned, and the token that ends it; what is beyond `max_length` is cut."""
    end = tokenizer.eos_token_id
    *prompts, texts = ([*part] for part in zip(*rows, strict=True))
    before = [_open(tokenizer, part) for part in prompts]
    after = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if before else _open(tokenizer, texts)
    )
    ids, targets, truncated = [], [], 0
    for i in range(len(rows)):
        prompt = before[0][i] if before else []
        row = [*prompt, *after[i], end]
        truncated += len(row) > max_length
        first = max(len(prompt), 1)  # nothing precedes the first token
        ids.append(row[:max_length])
        targets.append(([IGNORED] * (first - 1) + row[first:])[: len(ids[-1]) - 1])
    return Tokens(_padded(tokenizer, {"input_ids": ids, "target": targets}, max_length), truncated)


def _open(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Ids of texts that go on: with the special tokens that open one, without those that close it."""
    encoded: Mapping[str, Any] = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    return [
        ids[: len(ids) - mask[::-1].index(0)] if 0 in mask else []
        for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


def pads_with_end(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a text is filled up with the token that ends it, for want of another."""
    return tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None


def _padded(
    tokenizer: "PreTrainedTokenizerBase", columns: Mapping[str, list[list[int]]], max_length: int
) -> dict[str, np.ndarray]:
    """Rows of each column as `[N, max_length]`, with `attention_mask`, 1 at the tokens of `input_ids`."""
    pad = tokenizer.eos_token_id if pads_with_end(tokenizer) else tokenizer.pad_token_id
    fill = {**_FILL, "input_ids": pad or 0}
    arrays = {}
    for name, rows in {**columns, "attention_mask": [[1] * len(row) for row in columns["input_ids"]]}.items():
        arrays[name] = np.full((len(rows), max_length), fill.get(name, 0), np.int32)
        for i, row in enumerate(rows):
            arrays[name][i, : len(row)] = row
    return arrays
