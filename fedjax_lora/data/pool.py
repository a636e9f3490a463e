"""A training pool on the host, and the part of it that the clients of some rounds need."""

import os
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from fedjax_lora.core.errors import reason_of
from fedjax_lora.data.arrays import Pool
from fedjax_lora.data.cache import cache_folder
from fedjax_lora.data.tokens import digest


@struct.dataclass
class CohortRows:
    """The rows of the clients of some rounds in the part of the pool that these need: indexed like a table `[K, n]`.

    ids: `[M]` int32 in increasing order, filled up with K. Rows of a client that is not among them mean nothing.
    rows: `[M, n]` int32.
    scored: label of the examples `[S, n]` of the clients whose accuracies are measured, see `evaluate.scored_clients`.
    """

    ids: Array
    rows: Array
    scored: dict[str, Array]

    def __getitem__(self, ids: Array) -> Array:
        """`[..., n]` int32 rows of the clients `ids` `[...]`."""
        return self.rows[jnp.searchsorted(self.ids, ids)]


def mapped(pool: Pool) -> Pool:
    """The arrays `[N, ...]` of a pool as files of the cache, memory-mapped: what nobody reads takes no memory.

    A file is named by its content, and written anew where it is damaged. Where the cache cannot be written, the arrays
    stay in memory, with a warning.
    """
    try:
        return {name: _mapped(leaf) for name, leaf in pool.items()}
    except OSError as error:  # a read-only home should cost memory, not the run
        warnings.warn(f"the training pool stays in memory, {cache_folder()}: {reason_of(error)}", stacklevel=2)
        return pool


def _mapped(leaf: np.ndarray) -> np.ndarray:
    content = digest({"pool": leaf})
    path = cache_folder() / f"pool-{content}.npy"
    found = _open(path)
    if found is None or digest({"pool": found}) != content:
        _write(path, leaf)
        found = np.load(path, mmap_mode="r")
    return found


def _open(path: Path) -> np.ndarray | None:
    """The array of a file; None where there is none or it is cut off."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, leaf: np.ndarray) -> None:
    """Writes under another name first: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, leaf, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def taken(pool: Pool, rows: np.ndarray, size: int) -> Pool:
    """The rows `[n]` of a pool in arrays `[size, ...]`, of which the rest is zeros."""
    found = {name: np.zeros((size, *leaf.shape[1:]), leaf.dtype) for name, leaf in pool.items()}
    for name, leaf in pool.items():
        np.take(leaf, rows, axis=0, out=found[name][: len(rows)], mode="clip")  # any other mode makes a copy
    return found
