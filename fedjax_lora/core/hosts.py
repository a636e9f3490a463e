"""Several processes that run one program on the devices of all: which of them this is, and what only one does."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

ADDRESS, NUMBER, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""What the environment says where no cluster does: host:port of process 0, how many there are, and which this is."""


def join(asked: bool) -> None:
    """Become one of several processes, where that is asked for or a launcher has started several.

    JAX finds the others where it knows the launcher (Slurm, Kubernetes, MPI, Cloud TPU), else the environment says
    where they are. Call it before JAX is first used.

    Raises:
      ValueError: it is asked for, and nobody says where the others are.
    """
    if not asked and not launched():
        return
    count, process = (int(os.environ[name]) if name in os.environ else None for name in (NUMBER, PROCESS))
    try:
        jax.distributed.initialize(os.environ.get(ADDRESS), count, process)
    except ValueError as error:
        raise ValueError(
            f"--distributed must be told by a launcher or by {ADDRESS}, {NUMBER} and {PROCESS} where the other "
            f"processes are: {error}"
        ) from error


def launched() -> bool:
    """Whether Slurm, Cloud TPU on Kubernetes, or the environment has started several processes, by its variables."""
    if int(os.environ.get(NUMBER, 1)) > 1:
        return True
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in names and " " not in names  # else a warning that libtpu leaves there


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def wait(name: str) -> None:
    """Return when every process has come here; the name tells places apart."""
    if several():
        multihost_utils.sync_global_devices(name)


def on_first(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` returns in the first process, which alone does it; None in the others, which wait for it."""
    found = work(*given) if first() else None
    wait(getattr(work, "__qualname__", "work"))
    return found


def of_first(number: int) -> int:
    """The number that the first process gives."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


def largest(number: int) -> int:
    """The largest of the numbers that the processes give."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number)))) if several() else number


def memory() -> Any:
    """The device of JAX whose memory is the host's, not an accelerator's; None where `JAX_PLATFORMS` leaves none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def place(tree: Any, sharding: Sharding) -> Any:
    """Arrays that every process holds alike, with this sharding on the devices of all."""
    if not several():
        return jax.device_put(tree, sharding)

    def spread(leaf: Any) -> jax.Array:
        held = np.asarray(leaf)
        return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])

    return jax.tree.map(spread, tree)
