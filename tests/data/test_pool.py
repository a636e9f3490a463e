"""A pool in files that are memory-mapped: what is read is what was written, or what is damaged is written anew."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.data import pool
from fedjax_lora.data.cache import contents
from fedjax_lora.data.tokens import digest

POOL = {"image": np.arange(60, dtype=np.float32).reshape(5, 4, 3), "label": np.array([0, 2, 1, 0, 1], np.int32)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_mapped_is_what_was_written(folder):
    """Oracle: the arrays; the cache lists their files, and a second call writes none."""
    found = pool.mapped(POOL)
    assert all(isinstance(leaf, np.memmap) for leaf in found.values())
    for name, leaf in POOL.items():
        np.testing.assert_array_equal(found[name], leaf, strict=True)
    listed = next(kept for kept in contents() if kept.what == "training pools")
    assert len(listed.files) == 2 and sorted(listed.files) == sorted(folder.iterdir())
    written = [path.stat().st_ino for path in listed.files]
    pool.mapped(POOL)
    assert [path.stat().st_ino for path in listed.files] == written


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None], ids=["empty", "cut", "changed"])
def test_a_damaged_file_is_written_anew(folder, damage):
    """Oracle: the arrays."""
    pool.mapped(POOL)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\x07" if damage is None else damage)
    for name, leaf in pool.mapped(POOL).items():
        np.testing.assert_array_equal(leaf, POOL[name], strict=True)


def test_a_cache_that_cannot_be_written_costs_memory_alone(folder):
    folder.parent.joinpath("cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="the training pool stays in memory"):
        assert pool.mapped(POOL) is POOL


def test_rows_are_taken_in_their_order_and_filled_up():
    """Oracle: NumPy's own indexing."""
    rows = np.array([1, 3, 4])
    for name, leaf in pool.taken(POOL, rows, 4).items():
        np.testing.assert_array_equal(leaf[:3], POOL[name][rows])
        assert leaf.shape == (4, *POOL[name].shape[1:]) and leaf.dtype == POOL[name].dtype and not leaf[3:].any()


def test_rows_of_clients_are_found_by_their_ids():
    """Oracle: a table of all clients."""
    table = np.arange(20).reshape(10, 2)
    ids = np.array([2, 5, 9, 10, 10])
    found = pool.CohortRows(jnp.asarray(ids), jnp.asarray(table[np.minimum(ids, 9)]), {})
    np.testing.assert_array_equal(found[jnp.array([9, 2, 5, 5])], table[[9, 2, 5, 5]])
    assert found[jnp.array([[2], [9]])].shape == (2, 1, 2)


@pytest.mark.parametrize("leaf", [jnp.ones((3, 2), jnp.bfloat16), np.float32(3), np.zeros((0, 3)), np.ones((2, 3)).T])
def test_a_digest_is_of_the_bytes_in_order_whatever_the_array(leaf):
    """Oracle: SHA-256 of a copy of the bytes."""
    leaf = np.asarray(leaf)
    described = json.dumps([{"x": (str(leaf.dtype), leaf.shape)}, ["more"]]).encode()
    assert digest({"x": leaf}, "more") == hashlib.sha256(described + leaf.tobytes()).hexdigest()
