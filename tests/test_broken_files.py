"""Broken safetensors and checkpoints, made at random: each is read as what it is, or refused in one line.

The oracles are the shape of the message, the types of what was read, and a file beside the folder that no one may read.
The examples are few and the same each time, but for `make fuzz`.
"""

import gc
import json
import os
import shutil
import struct
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import checkpoint
from fedjax_lora.models import safetensors
from oracles.fuzzing import examples, nothing_else_read
from oracles.states import make_state

SECRET = "secret.safetensors"
NAMES = st.sampled_from(["a", "b", "", "__metadata__", "a\n", "é", "x" * 300])
NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 0.5, None, "1", True])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "f32", "", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
    },
)
HEADERS = st.dictionaries(NAMES, ENTRIES | st.none() | st.dictionaries(NAMES, NAMES | NUMBERS, max_size=2), max_size=3)


@st.composite
def tensor_file(draw) -> bytes:
    """Header and data by hand, of which the length, the JSON or the bytes may be wrong."""
    header = json.dumps(draw(HEADERS)).encode() if draw(st.booleans()) else draw(st.binary(max_size=20))
    length = draw(st.just(len(header)) | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))
    data = np.array(draw(st.lists(st.floats(width=32), max_size=4)), "<f4").tobytes()
    return (struct.pack("<Q", length) + header + data)[: draw(st.just(None) | st.integers(0, 60))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of weights, beside a file that it must not reach."""
    folder = tmp_path_factory.mktemp("beside") / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"secret": np.ones(3, np.float32)}, folder.parent / SECRET)
    return folder


@examples(300)
@given(tensor_file())
def test_a_broken_file_of_tensors_is_read_or_refused_in_one_line(model, content):
    file = model / "adapter.safetensors"
    file.write_bytes(content)
    try:
        with nothing_else_read(model):
            found = safetensors.read_all(file, "lora.initial")
    except ValueError as error:
        assert str(error).startswith("lora.initial must hold ") and len(str(error).splitlines()) == 1
    else:
        assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in found.values())


SHARDS = st.sampled_from(
    [
        "model-1.safetensors",
        f"../{SECRET}",
        f"./../{SECRET}",
        "..",
        ".",
        "",
        "/etc/passwd",
        "no",
        "a\0b",
        "x" * 300,
        3,
        None,
    ]
)


@examples(100)
@given(
    st.dictionaries(NAMES, SHARDS, max_size=3) | SHARDS,
    tensor_file(),
    st.none() | SHARDS | st.just("model.safetensors.index.json"),
)
def test_an_index_reaches_no_file_beyond_its_folder(model, weight_map, shard, named):
    (model / "model-1.safetensors").write_bytes(shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({} if named is None else {"transformers_weights": named}))
    try:
        with nothing_else_read(model):
            found = safetensors.tensor_files(model)
    except ValueError as error:
        assert str(error).startswith("model.pretrained must ") and len(str(error).splitlines()) == 1
    else:
        assert "secret" not in found and all(file.parent == model for file in found.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint, and the names of its files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(folder / "whole", make_state(3), "log")
    names = sorted(str(path.relative_to(folder / "whole")) for path in folder.rglob("*") if path.is_file())
    return folder, names


@st.composite
def damages(draw) -> list[tuple]:
    """What is done to files of a checkpoint, each by its place among all."""
    place = st.integers(0, 99)
    flip = st.tuples(st.just("flip"), place, st.floats(0, 1), st.integers(1, 255))
    write = st.tuples(
        st.just("write"), place, st.binary(max_size=20) | st.sampled_from([b"{}", b"[]", b"null", b"\xff"])
    )
    swap = st.tuples(st.just("swap"), place, place)
    return draw(st.lists(flip | write | swap | st.tuples(st.just("gone"), place), min_size=1, max_size=3))


def damage(folder, names, what, place, *more):
    path = folder / names[place % len(names)]
    if not path.is_file():
        return
    if what == "gone":
        path.unlink()
    elif what == "write":
        path.write_bytes(more[0])
    elif what == "swap":
        other = folder / names[more[0] % len(names)]
        if other.is_file():
            content = path.read_bytes(), other.read_bytes()
            other.write_bytes(content[0]), path.write_bytes(content[1])
    elif content := bytearray(path.read_bytes()):
        content[int(more[0] * (len(content) - 1))] ^= more[1]
        path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of coroutines that Orbax drops
@examples(20)
@given(damages(), st.booleans())
def test_a_broken_checkpoint_is_passed_over_or_refused_in_one_line(saved, changes, is_forged):
    """Where its hashes are forged as well, Orbax finds what is wrong, or the state is one of the right kind."""
    folder, names = saved
    shutil.rmtree(folder / "broken", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "broken")
    for change in changes:
        damage(folder / "broken", names, *change)
    same = all(
        (folder / "broken" / name).is_file()
        and (folder / "broken" / name).read_bytes() == (folder / "whole" / name).read_bytes()
        for name in names
    )
    if is_forged and (folder / "broken" / "3").is_dir():
        files = checkpoint._hashes(folder / "broken" / "3")
        (folder / "broken" / "3" / "sha256.json").write_text(json.dumps({"log": "log", "files": files}))
    with warnings.catch_warnings(record=True) as caught, nothing_else_read(folder / "broken"):
        warnings.simplefilter("always")
        found = list(checkpoint.whole(folder / "broken"))
        assert all(issubclass(w.category, RunWarning) and "\n" not in str(w.message) for w in caught)
        assert len(found) == (same or is_forged)
        like = make_state(0)
        for one in found:
            try:
                state = checkpoint.restore(one, like)
            except ValueError as error:
                assert not same and "cannot be read" in str(error) and "\n" not in str(error)
            else:
                assert jax.tree.structure(state) == jax.tree.structure(like)
                assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(like)]
            try:
                checkpoint.restore_trained(one)
            except ValueError as error:
                assert not same and "cannot be read" in str(error) and "\n" not in str(error)
    assert os.listdir(folder / "whole") == ["3"]
    gc.collect()  # of Orbax's coroutines, before another test is blamed for them
