"""Sentences to token ids, once: the result is kept in a cache on disk."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from fedjax_lora.data.cache import cache_folder
from fedjax_lora.data.tsv import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # part of the cache's key: raise it when the content of a cache file changes


class Tokens(NamedTuple):
    """Tokenised sentences.

    arrays: `input_ids` and `attention_mask`, both `[N, max_length]` int32.
    truncated: sentences that were longer than `max_length` tokens.
    """

    arrays: dict[str, np.ndarray]
    truncated: int


def tokenize(tokenizer: "PreTrainedTokenizerBase", sentences: list[str], max_length: int) -> Tokens:
    """Ids and mask of each sentence, special tokens included.

    Padding is on the right whatever the tokenizer prefers, and needs no padding token of its own: GPT-2 has none.
    """
    rows = list(tokenizer(sentences, verbose=False)["input_ids"])
    long = [i for i, row in enumerate(rows) if len(row) > max_length]
    if long:  # cut by the tokenizer, which keeps its closing token
        cut = tokenizer([sentences[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            rows[i] = row
    pad = tokenizer.pad_token_id or 0
    input_ids = np.full((len(rows), max_length), pad, np.int32)
    attention_mask = np.zeros((len(rows), max_length), np.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
    return Tokens({"input_ids": input_ids, "attention_mask": attention_mask}, len(long))


class Cache:
    """Tokenised files on disk, one safetensors file for each content, tokenizer and length.

    A file carries a digest of its arrays; one that is damaged is written anew.
    """

    def __init__(self, tokenizer_id: str, folder: str | PathLike[str] | None = None):
        """`tokenizer_id` names the tokenizer; when empty, nothing is kept. `folder` as in `sources.load`."""
        self.tokenizer_id = tokenizer_id
        self.folder = Path(folder) if folder else cache_folder()

    def tokenize(self, tokenizer: "PreTrainedTokenizerBase", table: Table, max_length: int) -> Tokens:
        """Tokens of `table`, from the cache where it holds them."""
        if not self.tokenizer_id:
            return tokenize(tokenizer, table.sentences, max_length)
        key = json.dumps([_FORMAT, table.sha256, self.tokenizer_id, _describe(tokenizer), max_length])
        path = self.folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        tokens = _read(path)
        if tokens is None:
            tokens = tokenize(tokenizer, table.sentences, max_length)
            try:
                _write(path, tokens)
            except OSError as error:  # a read-only home should cost time, not the run
                warnings.warn(f"tokens are not cached, {self.folder}: {error.strerror}", stacklevel=2)
        return tokens


def digest(arrays: Mapping[str, np.ndarray], *texts: str) -> str:
    """SHA-256 of named arrays (name, type, shape and content) and texts."""
    described = {name: (str(value.dtype), value.shape) for name, value in sorted(arrays.items())}
    sha256 = hashlib.sha256(json.dumps([described, texts]).encode())
    for name in described:
        sha256.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha256.hexdigest()


def _describe(tokenizer: "PreTrainedTokenizerBase") -> dict:
    """What a tokenizer does: its name alone may be a relative path, or a folder whose files have changed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # these two are set by the last call
    settings = {name: value for name, value in description.items() if name not in ("truncation", "padding")}
    return {**settings, "pad": tokenizer.pad_token_id}


def _read(path: Path) -> Tokens | None:
    """The tokens in a cache file; None where there is none or it is damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in ("input_ids", "attention_mask")}
        truncated, expected = metadata["truncated"], metadata["sha256"]
    except (OSError, safetensors.SafetensorError, KeyError, TypeError):
        return None
    return Tokens(arrays, int(truncated)) if digest(arrays, truncated) == expected else None


def _write(path: Path, tokens: Tokens) -> None:
    """Writes under another name first: a reader never meets half a file."""
    truncated = str(tokens.truncated)
    metadata = {"truncated": truncated, "sha256": digest(tokens.arrays, truncated)}
    content = safetensors.numpy.save(tokens.arrays, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
