"""Texts to token ids, once: the result is kept in a cache on disk."""

import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from fedjax_lora.core.errors import reason_of
from fedjax_lora.data.cache import cache_folder
from fedjax_lora.data.tables import Table, shorten
from fedjax_lora.data.texts import Kind, Row, Tokens, pads_with_end, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 3  # part of the cache's key: raise it when the content of a cache file changes
_NOT_RULES = {"name_or_path", "chat_template", "vocab_file", "tokenizer_file"}  # options that decide no tokens
_PADS_WITH_END = ("the tokenizer has no padding token: texts are filled up with the one that ends them, masked",)
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Cache:
    """Tokenised texts on disk, one safetensors file for each content, tokenizer and length.

    A file carries a digest of its arrays; one that is damaged is written anew.

    tokenizer_hash: as the function of that name gives it.
    notes: what a user should know of the tokenizer, each in one line.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tokenizer_id: str, folder: str | PathLike[str] | None = None
    ):
        """`tokenizer_id` names the tokenizer; when empty, nothing is kept. `folder` as in `sources.load`."""
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.notes = _PADS_WITH_END if pads_with_end(tokenizer) else ()
        self._tokenizer = tokenizer
        self._id = tokenizer_id
        self._folder = Path(folder) if folder else cache_folder()

    def tokenize(self, kind: Kind, rows: list[Row], table: Table, max_length: int) -> Tokens:
        """Tokens of texts, see `texts.tokenize`, from the cache where it holds them.

        Args:
          kind, rows, max_length: see there.
          table: of which the rows are made, for messages.

        Raises:
          ValueError: the tokenizer can make nothing of a text; names its line.
        """
        if not self._id:
            return _tokenize_table(self._tokenizer, kind, rows, table, max_length)
        libraries = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        texts = hashlib.sha256(json.dumps([kind, rows]).encode()).hexdigest()
        key = json.dumps([_FORMAT, texts, self._id, _made_of(self._tokenizer), libraries, max_length])
        path = self._folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        tokens = _read(path)
        if tokens is None:
            tokens = _tokenize_table(self._tokenizer, kind, rows, table, max_length)
            try:
                _write(path, tokens)
            except OSError as error:  # a read-only home should cost time, not the run
                warnings.warn(f"tokens are not cached, {self._folder}: {error.strerror}", stacklevel=2)
        return tokens


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of what decides tokens: vocabulary, rules, special tokens, sides and length, however they are written."""
    return hashlib.sha256(json.dumps(_describe(tokenizer), sort_keys=True).encode()).hexdigest()


def _made_of(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """All that could decide tokens: what is known to, class and files.

    A cache may miss needlessly, which costs time alone, but must not hit wrongly.
    """
    files = {}
    if tokenizer.name_or_path:
        names = {"tokenizer.json", *_SETTINGS_FILES, *tokenizer.vocab_files_names.values()}
        paths = [Path(tokenizer.name_or_path) / name for name in sorted(names)]
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}
    return [tokenizer_hash(tokenizer), type(tokenizer).__name__, files]


def digest(arrays: Mapping[str, np.ndarray], *texts: str) -> str:
    """SHA-256 of named arrays (name, type, shape and content) and texts."""
    described = {name: (str(value.dtype), value.shape) for name, value in sorted(arrays.items())}
    sha256 = hashlib.sha256(json.dumps([described, texts]).encode())
    for name in described:
        sha256.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def _describe(tokenizer: "PreTrainedTokenizerBase") -> dict:
    """What a tokenizer does, whatever it was read from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = json.loads(backend.to_str())
    else:  # one in Python, whose rules are its class and its options
        options = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name not in _NOT_RULES}
        description = {"class": type(tokenizer).__name__, "options": options, "vocabulary": tokenizer.get_vocab()}
    # these two are set by the last call
    rules = {name: value for name, value in description.items() if name not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    sides = [tokenizer.truncation_side, tokenizer.padding_side]
    return {
        **rules,
        "special": special,
        "pad": tokenizer.pad_token_id,
        "sides": sides,
        "most": tokenizer.model_max_length,
        "split_special": getattr(tokenizer, "split_special_tokens", False),  # in texts; the backend does not tell
    }


def _tokenize_table(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, rows: list[Row], table: Table, max_length: int
) -> Tokens:
    """`tokenize`, whose mistakes name a line of the file."""
    if kind == "continued" and tokenizer.eos_token_id is None:
        raise ValueError(
            "model.pretrained must be a model of the next token, whose tokenizer has one that ends a text (eos_token), "
            "for a task that learns next_token, got one without"
        )
    try:
        tokens = tokenize(tokenizer, kind, rows, max_length)
    except Exception as error:  # that of the tokenizer's library, which says neither where nor which class
        _check_each(tokenizer, kind, rows, table, max_length)
        raise ValueError(f"{table.name}: must be text that the tokenizer reads, got {reason_of(error)}") from None
    if (empty := np.flatnonzero(~tokens.arrays["attention_mask"].any(axis=1))).size:
        raise _unknown(table, rows, int(empty[0]), "no token")
    return tokens


def _check_each(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, rows: list[Row], table: Table, max_length: int
) -> None:
    """Raise ValueError for the first row that the tokenizer refuses."""
    for place, row in enumerate(rows):
        try:
            tokenize(tokenizer, kind, [row], max_length)
        except Exception as error:  # as above
            raise _unknown(table, rows, place, reason_of(error)) from None


def _unknown(table: Table, rows: list[Row], place: int, reason: str) -> ValueError:
    got = shorten(" ".join(rows[place]))
    return ValueError(f"{table.at(place)}: must be words that the model's tokenizer knows, got {got}: {reason}")


def _read(path: Path) -> Tokens | None:
    """The tokens in a cache file; None where there is none or it is damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
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
