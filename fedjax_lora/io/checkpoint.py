"""Checkpoints of a run's state, written by Orbax, each with the hashes of its files.

A checkpoint is a folder named by its round: `state/` of Orbax and `sha256.json`. It is filled under another name and
renamed when it is whole, so a process killed midway leaves the checkpoints before it as they were; what was damaged
later does not match its hashes, and is not believed.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedjax_lora.core import hosts
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.core.types import Adapters, ClientState, Factors, FedState
from fedjax_lora.io.files import atomic_folder, remove
from fedjax_lora.io.orbax import failing_in_one_line

_KEPT = 2
_STATE, _HASHES = "state", "sha256.json"


class Checkpoint(NamedTuple):
    """A checkpoint whose files are as they were written.

    path: its folder. step: its round. log_sha256: of the run's log up to that round.
    """

    path: Path
    step: int
    log_sha256: str


class Saver:
    """Writes checkpoints in a thread, one after another, by one checkpointer of Orbax, while its block runs.

    A state is copied before `save` returns: the program that consumes it may go on at once. An error is raised by the
    next `save`, by `wait` or at the end of the block.

    Args:
      waiting: states that may be held while others are written.
    """

    def __init__(self, waiting: int = 1):
        self._waiting = waiting
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._folders: set[Path] = set()

    def __enter__(self) -> Self:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._checkpointer = ocp.StandardCheckpointer()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with contextlib.suppress(*([] if kind is None else [ValueError])):  # the first error is told
                self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # all is written, or told: Orbax repeats what went wrong
                self._checkpointer.close()
            # Orbax's own threads may have written on after a save that failed was cleared away.
            for folder in self._folders if hosts.first() else ():
                for left in folder.glob(f".*.partial-{os.getpid()}"):
                    remove(left)

    def save(self, folder: str | Path, state: FedState, log_sha256: str = "") -> None:
        """Write `state` as the checkpoint of its round and keep the last two up to it.

        Raises:
          ValueError: an earlier one could not be written.
        """
        while len(self._pending) >= self._waiting:
            self._pending.popleft().result()
        path = Path(folder) / str(int(state.round))
        self._folders.add(path.parent)
        copied = jax.tree.map(lambda leaf: leaf.copy(), state)
        self._pending.append(self._thread.submit(_write, self._checkpointer, path, copied, log_sha256))

    def wait(self) -> None:
        """Return when all that was given is on disk.

        Raises:
          ValueError: one could not be written.
        """
        while self._pending:
            self._pending.popleft().result()


def save(folder: str | Path, state: FedState, log_sha256: str = "") -> None:
    """As `Saver.save`, done when it returns.

    Raises:
      ValueError: the folder cannot be written.
    """
    with Saver() as saver:
        saver.save(folder, state, log_sha256)


def _write(checkpointer: ocp.StandardCheckpointer, path: Path, state: FedState, log_sha256: str) -> None:
    with failing_in_one_line(f"checkpoint {path} cannot be written"):
        with _new_folder(path) as partial:
            checkpointer.save(partial.resolve() / _STATE, state)
            checkpointer.wait_until_finished()
            hosts.wait("the state is written")
            if hosts.first():
                text = json.dumps({"log": log_sha256, "files": _hashes(partial)}, indent=2)
                (partial / _HASHES).write_text(text + "\n", encoding="utf-8")
        hosts.on_first(_clear, path.parent, int(path.name))


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """An `atomic_folder` in place of what is there, which all processes of a run fill and the first one makes."""
    process = hosts.of_first(os.getpid())
    if not hosts.first():
        hosts.wait("a folder for the state")
        yield path.with_name(f".{path.name}.partial-{process}")
        return
    if path.exists():  # damaged, or of the same round of the same run
        remove(path)
    with atomic_folder(path) as partial:
        hosts.wait("a folder for the state")
        yield partial


def steps(folder: str | Path) -> list[int]:
    """Rounds of all that is named as a checkpoint is, whole or not, newest first."""
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def whole(folder: str | Path) -> Iterator[Checkpoint]:
    """The checkpoints that are as they were written, newest first; warns of each that is not, by name."""
    for step in steps(folder):
        path = Path(folder) / str(step)
        try:
            yield _verified(path, step)
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {path} is damaged and passed over: {error}", RunWarning, stacklevel=2)


def restore(found: Checkpoint, like: FedState) -> FedState:
    """The state of a checkpoint, bit for bit.

    Args:
      found: one of `whole`.
      like: a state of the same structure, shapes, dtypes and placement, such as a run's first.

    Raises:
      ValueError: the checkpoint is of another structure.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with failing_in_one_line(f"checkpoint {found.path} cannot be read"):
        with ocp.StandardCheckpointer() as checkpointer:
            state = cast(FedState, checkpointer.restore(found.path.resolve() / _STATE, abstract))
        _check_form(state, like)
        _check_round(found, state.round)
    return state


class Trained(NamedTuple):
    """What a checkpoint's model is made of, beside the frozen weights: fields as of FedState, NumPy arrays.

    clients: their `rank` and `personal` alone.
    """

    round: int
    adapters: Adapters
    merged: dict[str, np.ndarray]
    clients: ClientState


def restore_trained(found: Checkpoint) -> Trained:
    """The model of a checkpoint, on any machine and without a state to compare with.

    Raises:
      ValueError: it cannot be read.
    """
    with failing_in_one_line(f"checkpoint {found.path} cannot be read"):
        held = _read_parts(found.path / _STATE)
        _check_round(found, held["round"])
        modules = {name: Factors(**factors) for name, factors in held["adapters"]["modules"].items()}
        clients = ClientState(**held["clients"], methods={})
    return Trained(found.step, Adapters(modules=modules, head=held["adapters"]["head"]), held["merged"], clients)


def _check_form(state: FedState, like: FedState) -> None:
    """Orbax takes shapes from files, of which one may be another's."""
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(like), strict=True):
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} must be {wanted.dtype}{wanted.shape}, got {leaf.dtype}{leaf.shape}")


def _check_round(found: Checkpoint, number: Any) -> None:
    """Whole it may be, and yet a copy under another name."""
    if int(number) != found.step:
        raise ValueError(f"it must be of round {found.step}, got round {int(number)}")


def _read_parts(state: Path) -> dict[str, Any]:
    """The parts of a state that `Trained` is made of, as nested dicts of NumPy arrays.

    Arrays of JAX would be asked back onto the devices that they were saved from.
    """
    handler = ocp.PyTreeCheckpointHandler()
    place: Any = state.resolve()  # of etils by Orbax's types, which takes any; TensorStore takes no `..`
    stored = handler.metadata(place).tree
    parts = {name: stored[name] for name in ("round", "adapters", "merged")}
    parts["clients"] = {name: stored["clients"][name] for name in ("rank", "personal")}
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    wanted = ocp.args.PyTreeRestore(item=parts, restore_args=to_numpy, partial_restore=True)
    return handler.restore(place, args=wanted)


def _clear(folder: Path, step: int) -> None:
    """Remove what is older than the last two, what a damaged run held beyond, and what a kill left half written."""
    past = [number for number in steps(folder) if number <= step][_KEPT:]
    beyond = [number for number in steps(folder) if number > step]
    for path in [*(folder / str(number) for number in (*past, *beyond)), *folder.glob(".*.partial-*")]:
        remove(path)


def _verified(path: Path, step: int) -> Checkpoint:
    """Raises OSError or ValueError where a file is not what it was."""
    try:
        found = json.loads((path / _HASHES).read_text(encoding="utf-8"))
        log, files = str(found["log"]), dict(found["files"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{_HASHES} is not what was written") from error
    there = _hashes(path)
    for name in sorted(files.keys() | there.keys()):
        if files.get(name) != there.get(name):
            what = "is missing" if name not in there else "was not there" if name not in files else "has changed"
            raise ValueError(f"{name} {what}")
    return Checkpoint(path, step, log)


def _hashes(folder: Path) -> dict[str, str]:
    """Path of each file within the folder, but for the list of hashes itself -> SHA-256 of its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / _HASHES]
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
