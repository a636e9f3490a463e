"""What a run will hold in memory, by its shapes alone, against what there is: what cannot fit is refused at once."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from fedjax_lora import trees
from fedjax_lora.base import FedState
from fedjax_lora.lora.adapters import max_rank
from fedjax_lora.sim.cohort import padded_size
from fedjax_lora.sim.engine import EngineConfig
from fedjax_lora.sim.local import LocalConfig
from fedjax_lora.sim.parts import Parts, World

ADAPTERS_OF_A_CLIENT = 3
"""Copies of each client's adapters that a round holds: as trained, as received, as averaged."""

ADAPTERS_IN_TRAINING = 4
"""Copies beside them of a client in training: the adapters, their gradient, two moments."""


class Term(NamedTuple):
    """Bytes on one device, and what to do for less of them."""

    bytes: float
    remedy: str


def run_terms(
    parts: Parts,
    world: World,
    state: FedState,
    activation_bytes: int,
    num_layers: int,
    local: LocalConfig,
    engine: EngineConfig,
) -> list[Term]:
    """What each device holds at the peak of a run: in training or in evaluation, whichever takes more.

    A low estimate: what XLA adds to it is not known before it has compiled.

    Args:
      parts, world, state: of the run; of the latter two only shapes are used.
      activation_bytes: what the backward pass of one client keeps, see `sim.chunk`.
      num_layers: L of the model, which work one after the other.
      local, engine: as they were asked for; a batch takes no more than what fills it.
    """
    base, adapters = trees.num_bytes(world.base), trees.num_bytes(state.adapters)
    clients = trees.num_bytes((state.clients, state.link))
    num_clients, num_tests = world.data.count.shape[0], world.data.test["label"].shape[0]
    cohort = padded_size(parts.cohort_size, parts.chunk, parts.mesh.size) // parts.mesh.size
    # The backward pass works on one layer beside what is kept of all; a forward pass holds half of a layer at a time.
    training = activation_bytes * (1 + 1 / num_layers) + ADAPTERS_IN_TRAINING * adapters
    example = activation_bytes / min(local.batch_size, int(world.data.count.max())) / num_layers / 2
    tested = min(engine.eval_batch_size, -(-num_tests // parts.mesh.size))

    several = f"lower engine.client_chunk, got {engine.client_chunk}"
    in_training = [
        Term(
            cohort * (ADAPTERS_OF_A_CLIENT * adapters + clients / num_clients),
            f"lower clients.per_round, got {parts.cohort_size}",
        ),
        Term(parts.chunk * training, several if parts.chunk > 1 else f"lower local.batch_size, got {local.batch_size}"),
    ]
    in_evaluation = [Term(tested * example, f"lower engine.eval_batch_size, got {engine.eval_batch_size}")]
    return [
        Term(base * (2 if state.merged else 1), "take a smaller model.pretrained"),
        Term(trees.num_bytes(world.data), "lower data.max_length, or take less data"),
        # A run begins with a copy of its state.
        Term(2 * clients, f"lower clients.count, got {num_clients}"),
        Term(2 * (trees.num_bytes(state) - clients), f"lower lora.max_rank, got {max_rank(state.adapters)}"),
        # The bits of each client, up and down, of all rounds between two evaluations.
        Term(engine.eval_every * 8 * parts.cohort_size, f"lower engine.eval_every, got {engine.eval_every}"),
        *max(in_training, in_evaluation, key=total),
    ]


def total(terms: Sequence[Term]) -> float:
    """Bytes of all of them."""
    return sum(term.bytes for term in terms)


def check(terms: Sequence[Term], num_devices: int) -> None:
    """Refuse what so many devices cannot hold.

    Raises:
      ValueError: says what would make the largest term smaller.
    """
    sharing = num_devices if jax.devices()[0].platform == "cpu" else 1  # a machine's memory; else each has its own
    needed, available = sharing * total(terms), available_bytes()
    if needed > available:
        largest = max(terms, key=lambda term: term.bytes)
        raise ValueError(
            f"memory must hold about {needed / 1e9:,.2f} GB, and {available / 1e9:,.2f} GB are available: "
            f"{largest.remedy} ({sharing * largest.bytes / 1e9:,.2f} GB)"
        )


def available_bytes() -> float:
    """What this process may hold on an accelerator or, on a CPU, in all of the machine; inf where nobody says."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    return min(_machine_bytes(), *map(_limit_bytes, CGROUP_LIMITS))


CGROUP_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux keeps what a container may hold: version 2 of control groups, and 1."""


def _limit_bytes(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


def _machine_bytes() -> float:
    """What is free or this process's already; the whole memory where that is not told."""
    try:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        whole = os.sysconf("SC_PHYS_PAGES") * page_bytes
    except (AttributeError, ValueError):  # not on Windows
        return math.inf
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        own = int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes
        return 1024 * int(lines["MemAvailable"].split()[0]) + own
    except (OSError, KeyError):  # not on macOS
        return whole
