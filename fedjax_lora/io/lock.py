"""A lock on a folder that other processes see, and that ends with the process that holds it, however that ends."""

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedjax_lora.core.errors import RunWarning

LOCK = ".lock"
"""The file that is locked, of which the content, a process id, is for people: it stays behind and locks nothing."""


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, and out of the runs right below it, while the block runs.

    On a file system without locks it warns and keeps no one out.

    Raises:
      ValueError: another process is in it, or in the folder above, that of a sweep; names folder and process.
    """
    folder = Path(folder).absolute()
    if (folder.parent / LOCK).is_file():
        check_unlocked(folder.parent)
    file = _open(folder)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def check_unlocked(folder: str | Path) -> None:
    """Refuse a folder that another process has locked.

    Raises:
      ValueError: names folder and process.
    """
    os.close(_open(Path(folder)))


def _open(folder: Path) -> int:
    """The lock, held as long as the descriptor is open."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # no process that is started inherits it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 20, 0).decode(errors="replace").strip() or "another"
        os.close(file)
        raise ValueError(
            f"{folder} must be a folder that no other process writes to, got one in use by process {holder}"
        ) from None
    except OSError as error:
        warnings.warn(f"{folder} is not locked against other processes: {error.strerror}", RunWarning, stacklevel=4)
    return file
