"""Files that are there in full or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a process killed midway, never leaves half a file there."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document for people and programs."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files of these names that a folder holds."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_can_hold_files(path: str | Path) -> None:
    """Refuse a folder that can neither be made nor be written to.

    Raises:
      ValueError: what is there, or the nearest above it, is no folder or cannot be written to.
    """
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            f"{path} must be a folder to write to, got {there}, no folder or one that cannot be written to"
        )


def check_can_become_folder(path: str | Path) -> None:
    """Refuse a place that `atomic_folder` could not give to a new folder.

    Raises:
      ValueError: as of `check_can_hold_files`, or an empty folder is there that cannot be replaced: it is a mount
        point, or the one above it cannot be written to.
    """
    target = _resolved(path)
    check_can_hold_files(target)
    if target.exists() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK)):
        raise ValueError(f"{path} must be a new folder or one that can be replaced, got {target}; choose one below it")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill; it takes the name `path`, which must be new or empty, when the block ends without an error.

    Raises:
      ValueError: `path` is in use, or cannot be written.
    """
    target = _resolved(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{path} must be a new or an empty folder, got one in use")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"{path} must be a folder that can be written, got {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def naming_a_full_disk(path: str | Path) -> Iterator[None]:
    """Say in one line that what is being written to `path` finds no more space.

    Raises:
      ValueError: it is so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{path} cannot be written: {error.strerror}; what was saved before stays") from error


def _resolved(path: str | Path) -> Path:
    """What a link names, which no folder can take the place of."""
    return Path(os.path.realpath(path))
