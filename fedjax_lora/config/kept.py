"""What simulations share, kept by all that decides about it: compiled programs, and how much memory a client takes."""

import collections
from collections.abc import Callable
from typing import Any

import jax

from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core.numbers import Numbers, split
from fedjax_lora.core.types import Adapters
from fedjax_lora.sim.chunk import activation_bytes
from fedjax_lora.sim.engine import Program
from fedjax_lora.sim.parts import MakeParts, World

_ACTIVATIONS: dict[Any, int] = {}
"""Bytes of one client's activations, by all that decides about them: a sweep over other keys asks for the same."""

_DECISIVE = ("model", "adapter", "task", "training", "aggregation")
"""Slots that decide about a client's activations."""


def client_activations(
    config: ExperimentConfig,
    catalogue: Catalogue,
    make_parts: MakeParts,
    numbers: Numbers,
    world: World,
    like: Adapters,
) -> int:
    """Bytes of one client's activations in training."""
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (like, world.base, world.data.train))
    slots = tuple(split(getattr(config, slot))[0] for slot in _DECISIVE)
    decisive = (catalogue, slots, config.local.batch_size, str(shapes))
    try:
        known = _ACTIVATIONS.get(decisive)
    except TypeError:  # options of a user's own that have no hash
        return activation_bytes(make_parts, numbers, world, like, config.local.batch_size)
    if known is None:
        known = _ACTIVATIONS[decisive] = activation_bytes(make_parts, numbers, world, like, config.local.batch_size)
    return known


_PROGRAMS: collections.OrderedDict[Any, Program] = collections.OrderedDict()
_MOST_PROGRAMS = 32


def shared_program(decisive: Any, make: Callable[[], Program]) -> Program:
    """The program of all that decides about it, made once while the newest are kept."""
    try:
        program = _PROGRAMS.pop(decisive, None)
    except TypeError:  # options of a user's own that have no hash
        return make()
    _PROGRAMS[decisive] = program or make()
    while len(_PROGRAMS) > _MOST_PROGRAMS:
        _PROGRAMS.popitem(last=False)
    return _PROGRAMS[decisive]
