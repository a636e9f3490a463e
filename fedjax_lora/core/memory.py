"""What the machine can hold, and how to refuse what it cannot: at once, and saying what would make it smaller."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax


class Term(NamedTuple):
    """Bytes on one device, what to do for less of them, and what they are of."""

    bytes: float
    remedy: str
    kind: str = ""


def total(terms: Sequence[Term]) -> float:
    """Bytes of all of them."""
    return sum(term.bytes for term in terms)


def check(terms: Sequence[Term], num_devices: int) -> None:
    """Refuse what so many devices cannot hold.

    Raises:
      ValueError: says what would make the largest term smaller.
    """
    sharing = (
        num_devices if jax.local_devices()[0].platform == "cpu" else 1
    )  # a machine's memory; else each has its own
    needed, available = sharing * total(terms), available_bytes()
    if needed > available:
        largest = max(terms, key=lambda term: term.bytes)
        raise ValueError(
            f"memory must hold about {needed / 1e9:,.2f} GB, and {available / 1e9:,.2f} GB are available: "
            f"{largest.remedy} ({sharing * largest.bytes / 1e9:,.2f} GB)"
        )


def available_bytes() -> float:
    """What this process may hold on an accelerator or, on a CPU, in all of the machine; inf where nobody says."""
    device = jax.local_devices()[0]
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
