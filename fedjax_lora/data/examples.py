"""A data set on the host, as NumPy arrays: what every source gives."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_lora.data import tokens
from fedjax_lora.data.arrays import Pool


class Examples(NamedTuple):
    """A data set on the host.

    name: what it is called in logs.
    train, test: input name -> `[N, ...]` array, and `label: [N]` int32; `target` where something else is learned.
    public: disjoint examples of the same form for central pre-training, or None.
    class_names: name of each label, and of each target where words are labelled.
    image_shape: `(height, width, channels)` of an image, None for text.
    truncated: texts of train and test that were cut to `max_length` tokens.
    fingerprint: SHA-256 of the arrays and the class names.
    tokenizer_hash: SHA-256 of what decides tokens, as `tokens.tokenizer_hash`; empty for images.
    clients: `[N]` int32, who holds each example of train, where the data say so. client_names: name of each of them.
    notes: what a user should know of how the data were read, each in one line.
    columns: role -> column of the tables that were read; empty where these name no columns.
    """

    name: str
    train: Pool
    test: Pool
    public: Pool | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    truncated: int
    fingerprint: str
    tokenizer_hash: str = ""
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    columns: Mapping[str, str] = {}


def gather(name: str, train: Pool, test: Pool, class_names: tuple[str, ...], **more) -> Examples:
    """The examples with their fingerprint; `more` are other fields of `Examples`."""
    given = {"public": None, "image_shape": None, "truncated": 0, **more}
    parts = {"train": train, "test": test, "public": given["public"] or {}}
    arrays = {f"{part}/{leaf}": value for part, leaves in parts.items() for leaf, value in leaves.items()}
    fingerprint = tokens.digest(arrays, *class_names)
    return Examples(name, train, test, class_names=class_names, fingerprint=fingerprint, **given)
