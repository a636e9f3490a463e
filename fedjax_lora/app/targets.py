"""Devices that a run may be foreseen on without having them."""

import os
import re
from typing import Any, NamedTuple

from fedjax_lora.core.errors import ConfigError


class Chip(NamedTuple):
    """What its maker says of a device.

    memory_bytes: of it. flop_per_s: of products in bfloat16, without sparsity. bytes_per_s: to and from memory.
    source: where that is said.
    """

    memory_bytes: float
    flop_per_s: float
    bytes_per_s: float
    source: str


_TPU, _NVIDIA = "https://cloud.google.com/tpu/docs/", "https://www.nvidia.com/en-us/data-center/"

TPUS = {
    "v5e": Chip(16e9, 197e12, 819e9, _TPU + "v5e"),
    "v5p": Chip(95e9, 459e12, 2765e9, _TPU + "v5p"),
    "v6e": Chip(32e9, 918e12, 1640e9, _TPU + "v6e"),
}
GPUS = {
    "a100": Chip(80e9, 312e12, 2039e9, _NVIDIA + "a100"),
    "h100": Chip(80e9, 989e12, 3350e9, _NVIDIA + "h100"),
    "h200": Chip(141e9, 989e12, 4800e9, _NVIDIA + "h200"),
    "l4": Chip(24e9, 121e12, 300e9, _NVIDIA + "l4"),
}


class Target(NamedTuple):
    """Devices of one kind.

    name: as given. chip: of the table. chips: how many. devices: what a compiler is told of them; None without one.
    """

    name: str
    chip: Chip
    chips: int
    devices: Any


def compile_alone() -> None:
    """Have no device of this machine looked for, nor asked what it is; to be called before JAX is imported."""
    for name, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # several processes may compile at once
    ):
        os.environ.setdefault(name, value)


def find(name: str) -> Target:
    """The target of this name: `KIND:XxY` of TPUs (`v5e:4x4`), `gpu:KINDxN` of GPUs (`gpu:h100x8`).

    Raises:
      ConfigError: there is no such target, or no compiler for it.
    """
    if (gpu := re.fullmatch(r"gpu:([a-z0-9]+)x([1-9][0-9]*)", name)) and gpu[1] in GPUS:
        return Target(name, GPUS[gpu[1]], int(gpu[2]), None)
    kind = name.partition(":")[0]
    if kind in TPUS and re.fullmatch(r"[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)+", name):
        devices = _topology(name)
        return Target(name, TPUS[kind], len(devices), devices)
    tpus, gpus = (", ".join(kinds) for kinds in (TPUS, GPUS))
    raise ConfigError(
        f"--target must be KIND:XxY with a TPU of {tpus}, or gpu:KINDxN with a GPU of {gpus}, got {name!r}"
    )


def _topology(name: str) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # of the plug-in, which has no class for it
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--target {name} must be a topology that the compiler of TPUs knows, of fedjax-lora[tpu]: {reason}"
        ) from error
