"""Checkpoints: bit for bit, the newest good one, the last two kept. The oracle is the state that was saved."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import checkpoint
from oracles.states import make_state


def newest(folder, like):
    return checkpoint.restore(next(checkpoint.whole(folder)), like)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).shape == np.asarray(y).shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("memory", [(), {"error": jnp.arange(6.0).reshape(2, 3)}], ids=["no memory", "memory"])
def test_restore_returns_the_bits_that_were_saved(tmp_path, memory):
    state = make_state(3, memory)
    folder = tmp_path / "a run #1 at 50%20?"
    checkpoint.save(folder, state)
    restored = newest(folder, make_state(0, memory))
    assert_same_bits(restored, state)
    draws = [jax.random.normal(jax.random.fold_in(s.key, 1), (3,)) for s in (restored, state)]
    np.testing.assert_array_equal(*draws)


def test_what_was_trained_is_the_same_without_a_state_like_it(tmp_path):
    state = make_state(3)
    checkpoint.save(tmp_path, state)
    trained = checkpoint.restore_trained(next(checkpoint.whole(tmp_path)))
    assert trained.round == 3
    np.testing.assert_array_equal(trained.adapters.modules["query"].a, state.adapters.modules["query"].a)
    np.testing.assert_array_equal(trained.adapters.head["bias"], state.adapters.head["bias"])


def test_nothing_saved_is_nothing(tmp_path):
    assert not list(checkpoint.whole(tmp_path))
    assert not list(checkpoint.whole(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


def test_the_last_two_are_kept_and_a_round_is_saved_once(tmp_path):
    for round_number in (1, 5, 10):
        checkpoint.save(tmp_path, make_state(round_number))
    checkpoint.save(tmp_path, make_state(10))
    assert sorted(os.listdir(tmp_path)) == ["10", "5"]
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(10))


def test_a_save_that_was_interrupted_is_ignored_and_cleared(tmp_path):
    checkpoint.save(tmp_path, make_state(2))
    shutil.copytree(tmp_path / "2", tmp_path / ".4.partial-1")
    shutil.rmtree(tmp_path / ".4.partial-1" / "state")
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(2))
    checkpoint.save(tmp_path, make_state(4))
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(4))
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]


def flip(path):
    """64 bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = slice(max(0, len(content) // 2 - 32), len(content) // 2 + 32)
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {
    "flipped": (lambda folder: flip(largest(folder)), "has changed"),
    "truncated": (lambda folder: os.truncate(largest(folder), 10), "has changed"),
    "a file gone": (lambda folder: largest(folder).unlink(), "is missing"),
    "a file more": (lambda folder: (folder / "state" / "x").write_text("x"), "x was not there"),
    "hashes flipped": (lambda folder: flip(folder / "sha256.json"), "sha256.json"),
    "hashes gone": (lambda folder: (folder / "sha256.json").unlink(), "sha256.json"),
    "a list of hashes": (lambda folder: (folder / "sha256.json").write_text("[]"), "not what was written"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "sha256.json"),
    "a file instead": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "Not a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_replaced_oracle_the_one_before(tmp_path, damage, capfd):
    for round_number in (2, 4):
        checkpoint.save(tmp_path, make_state(round_number))
    apply, word = DAMAGE[damage]
    apply(tmp_path / "4")
    with pytest.warns(RunWarning, match=rf"checkpoint {tmp_path / '4'} is damaged and passed over: .*{word}"):
        assert_same_bits(newest(tmp_path, make_state(0)), make_state(2))
    checkpoint.save(tmp_path, make_state(4))
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(4))
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]
    assert capfd.readouterr().err == ""


def test_what_is_ahead_of_the_run_goes_once_it_saves(tmp_path):
    checkpoint.save(tmp_path, make_state(2))
    (tmp_path / "9").mkdir()
    checkpoint.save(tmp_path, make_state(4))
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]


KILLED = """
import importlib.util, os, signal
spec = importlib.util.spec_from_file_location("states", {file!r})
states = importlib.util.module_from_spec(spec)
spec.loader.exec_module(states)
states.checkpoint.save({folder!r}, states.make_state(1))
# The rename that would make the second one whole.
os.rename = os.replace = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
states.checkpoint.save({folder!r}, states.make_state(2))
"""


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path):
    script = KILLED.format(file=__file__, folder=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(os.listdir(tmp_path)) == 2
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(1))


def test_a_state_may_be_consumed_while_it_is_saved(tmp_path):
    """A donated buffer is written over by the next program. Oracle: the state that was given."""
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    with checkpoint.Saver() as saver:
        for round_number in range(1, 6):
            state = jax.tree.map(jnp.copy, make_state(round_number))
            saver.save(tmp_path, state)
            overwrite(state)
    assert sorted(os.listdir(tmp_path)) == ["4", "5"]
    assert_same_bits(newest(tmp_path, make_state(0)), make_state(5))


def test_a_save_that_failed_is_told_by_the_next_one_or_at_the_end(tmp_path):
    (tmp_path / "file").write_text("x")
    with checkpoint.Saver() as saver:
        saver.save(tmp_path / "file", make_state(1))
        with pytest.raises(ValueError, match=r"checkpoint .* cannot be written"):
            saver.save(tmp_path / "file", make_state(2))
        saver.save(tmp_path, make_state(3))
    with pytest.raises(ValueError, match=r"checkpoint .* cannot be written"), checkpoint.Saver() as saver:
        saver.save(tmp_path / "file", make_state(4))
    assert checkpoint.steps(tmp_path) == [3]


ON_DEVICES = """
import importlib.util, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from fedjax_lora.io import checkpoint
from oracles.states import make_state
number, folder = int(sys.argv[1]), sys.argv[2]
assert jax.device_count() == number
mesh = jax.make_mesh((number,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))

def placed(state):
    def place(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % 4 == 0
        return jax.device_put(leaf, NamedSharding(mesh, P("clients") if split else P()))
    return jax.tree.map(place, state)

like = make_state(0, {"error": jnp.arange(24.0).reshape(8, 3)})
if number == 4:
    checkpoint.save(folder, placed(like))
else:
    found = checkpoint.restore(next(checkpoint.whole(folder)), placed(like))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert len(x.sharding.device_set) == number
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert jax.device_get(x).tobytes() == jax.device_get(y).tobytes()
"""


def test_a_state_of_four_devices_goes_on_on_two(tmp_path):
    """Clients' leaves over all devices, the others on each: the bits that were saved."""
    for number in (4, 2):
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(number), "PYTHONPATH": path}
        command = [sys.executable, "-c", ON_DEVICES, str(number), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_another_structure_is_one_line(tmp_path, capfd):
    checkpoint.save(tmp_path, make_state(2))
    with pytest.raises(ValueError, match="cannot be read") as caught:
        newest(tmp_path, make_state(0, {"error": jnp.zeros(3)}))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "2") in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        checkpoint.save(tmp_path / "file", make_state(2))
    assert "\n" not in str(caught.value)
