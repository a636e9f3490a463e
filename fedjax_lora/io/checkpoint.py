"""Checkpoints of a run's state, written by Orbax.

A checkpoint is a folder named by its round. Orbax writes it under another name and renames it when it is whole,
so a process killed midway leaves the checkpoints before it as they were.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from fedjax_lora.base import Adapters, ClientState, Factors, FedState

_KEPT = 2


def save(folder: str | Path, state: FedState) -> None:
    """Write `state` as the checkpoint of its round and keep the last two; done when it returns.

    A round that is saved already stays as it is: a run's state is a function of its configuration and the round.

    Raises:
      ValueError: the folder cannot be written.
    """
    step = int(state.round)
    try:
        with _manager(folder) as manager:
            if step not in manager.all_steps():
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
    except Exception as error:  # Orbax and TensorStore share no base class
        raise ValueError(f"checkpoint {Path(folder) / str(step)} cannot be written: {_one_line(error)}") from error


def restore(folder: str | Path, like: FedState) -> FedState | None:
    """The latest whole checkpoint, bit for bit, or None if there is none.

    Args:
      folder: where `save` wrote.
      like: a state of the same structure, shapes, dtypes and placement, such as a run's first.

    Raises:
      ValueError: the checkpoint cannot be read, or is of another structure.
    """
    if not Path(folder).is_dir():
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    step = None
    try:
        with _manager(folder) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            _check_readable(Path(folder).absolute() / str(step))
            return cast(FedState, manager.restore(step, args=ocp.args.StandardRestore(abstract)))
    except Exception as error:  # Orbax and TensorStore share no base class
        raise ValueError(f"checkpoint {Path(folder) / str(step)} cannot be read: {_one_line(error)}") from error


class Trained(NamedTuple):
    """What a checkpoint's model is made of, beside the frozen weights: fields as of FedState, NumPy arrays.

    clients: their `rank` and `kept` alone.
    """

    round: int
    adapters: Adapters
    merged: dict[str, np.ndarray]
    clients: ClientState


def restore_trained(folder: str | Path) -> Trained | None:
    """The model of the latest checkpoint, on any machine and without a state to compare with, or None if there is none.

    Raises:
      ValueError: the checkpoint cannot be read.
    """
    if not Path(folder).is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
    if step is None:
        return None
    checkpoint = Path(folder).absolute() / str(step)
    try:
        _check_readable(checkpoint)
        held = _read_parts(checkpoint)
        modules = {name: Factors(**factors) for name, factors in held["adapters"]["modules"].items()}
        clients = ClientState(rank=held["clients"]["rank"], kept=held["clients"]["kept"], memory=None, drift=None)
        return Trained(step, Adapters(modules=modules, head=held["adapters"]["head"]), held["merged"], clients)
    except Exception as error:  # Orbax and TensorStore share no base class
        raise ValueError(f"checkpoint {Path(folder) / str(step)} cannot be read: {_one_line(error)}") from error


def _read_parts(checkpoint: Path) -> dict[str, Any]:
    """The parts of a state that `Trained` is made of, as nested dicts of NumPy arrays.

    Arrays of JAX would be asked back onto the devices that they were saved from.
    """
    handler = ocp.PyTreeCheckpointHandler()
    place: Any = checkpoint / "default"  # a path of etils by Orbax's types, which takes any
    stored = handler.metadata(place).tree
    parts = {"adapters": stored["adapters"], "merged": stored["merged"]}
    parts["clients"] = {name: stored["clients"][name] for name in ("rank", "kept")}
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    wanted = ocp.args.PyTreeRestore(item=parts, restore_args=to_numpy, partial_restore=True)
    return handler.restore(place, args=wanted)


@contextlib.contextmanager
def _manager(folder: str | Path) -> Iterator[ocp.CheckpointManager]:
    """A synchronous manager of the folder that logs nothing below errors."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
            yield manager
    finally:
        logging.set_verbosity(verbosity)


def _check_readable(checkpoint: Path) -> None:
    """Read every stored value once, one after the other.

    Orbax reads all arrays at a time; where one is damaged, the others' callbacks print tracebacks past the error.
    """
    base = {"driver": "file", "path": f"{checkpoint.resolve()}/default/"}  # TensorStore takes no `..`
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        store.read(key).result()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
