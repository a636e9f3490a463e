"""The lock on a folder. The oracle is another process, or another descriptor, that asks for it."""

import os
import signal
import subprocess
import sys

import pytest

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import lock


def test_a_folder_is_locked_once_and_free_again_afterwards(tmp_path):
    with lock.locked(tmp_path):
        with pytest.raises(ValueError, match="must be a folder that no other process writes to") as caught:
            lock.check_unlocked(tmp_path)
        assert str(tmp_path) in str(caught.value) and f"process {os.getpid()}" in str(caught.value)
    lock.check_unlocked(tmp_path)


def test_a_trial_is_locked_with_the_folder_of_its_sweep(tmp_path):
    (tmp_path / "trial").mkdir()
    with lock.locked(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} must be"), lock.locked(tmp_path / "trial"):
        pass
    with lock.locked(tmp_path / "trial"):
        lock.check_unlocked(tmp_path)


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    script = """
import sys, time
from fedjax_lora.io import lock
with lock.locked(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
        lock.check_unlocked(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lock.check_unlocked(tmp_path)


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(RunWarning, match="is not locked against other processes: Function not implemented"):
        lock.check_unlocked(tmp_path)
