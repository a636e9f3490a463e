"""Where world and state of a run live: which of their axes are split over which axes of the mesh of devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_lora.core.types import Base, FedState
from fedjax_lora.sim.cohort import CLIENTS, MODEL, TRIALS, replicated, split_over
from fedjax_lora.sim.parts import Layout, World

OF_CLIENTS = ("wireless",)
"""The states of methods whose leaves are `[K, ...]`, beside `FedState.clients`."""


SPLIT = ("mlp", "heads", "vocab", "embed")
"""Logical axes of which the first that its devices divide is split over the mesh axis `model`.

Of two products one after another, such as `up` and `down`, the first then makes columns of what is between, and the
second sums over them: what devices exchange is as wide as the model.
"""


def world_shardings(like: World, layout: Layout) -> World:
    """The sharding of each leaf of a world: large frozen weights are split over `model`, all else is whole."""
    data = jax.tree.map(lambda _: replicated(layout.mesh), like.data)
    return World(base=base_shardings(like.base, layout), data=data)


def base_shardings(like: Base, layout: Layout) -> Base:
    """The sharding of each frozen weight.

    A matrix is split by its logical axes, see SPLIT; without such, along the longer of its last two axes that the
    devices divide. Vectors are whole, and the axis of layers is never split.

    Args:
      like: arrays or shapes.
      layout: of the work, with the logical axes.
    """

    def split(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = name.split("/")[0] == "layers"
        axis = _split_axis(leaf.shape, layout.axes.get(name, ()), stacked, layout.model_devices)
        return replicated(layout.mesh) if axis is None else NamedSharding(layout.mesh, P(*(None,) * axis, MODEL))

    return jax.tree_util.tree_map_with_path(split, like)


def base_bytes(like: Base, layout: Layout) -> int:
    """Bytes of the frozen base on one device."""

    def held(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, like, base_shardings(like, layout))))


def _split_axis(shape: Sequence[int], names: Sequence[str | None], stacked: bool, devices: int) -> int | None:
    """Which axis of a frozen weight is split; None for none."""
    if devices == 1 or len(shape) - stacked < 2:
        return None
    last = range(len(shape) - 2, len(shape))
    named = [names.index(name) for name in SPLIT if name in names]
    order = named if names else sorted(last, key=lambda axis: -shape[axis])
    return next((axis for axis in order if shape[axis] % devices == 0), None)


def state_shardings(like: FedState, layout: Layout, lanes: bool = False) -> FedState:
    """The sharding of each leaf of a state.

    What is of each client is split over the mesh axis `clients`, where its devices divide K, and what is merged into
    matrices of the frozen base over `model`; all else is whole on each device, as is everything where clients are
    worked on in order.

    Args:
      like: arrays or shapes.
      layout: of the work.
      lanes: whether all leaves have a leading axis of trials, which is split over the mesh axis `trials`.
    """
    lane = (TRIALS,) if lanes else ()
    whole = split_over(layout.mesh, lane, (layout.mesh.shape[TRIALS],)) if lanes else replicated(layout.mesh)

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _split(leaf.shape), tree)

    def _split(shape: tuple[int, ...]) -> NamedSharding:
        return whole if layout.in_order else split_over(layout.mesh, (*lane, CLIENTS), shape)

    def of_matrix(leaf: Any) -> NamedSharding:
        axis = _split_axis(leaf.shape[len(lane) :], (), True, layout.model_devices)
        return whole if axis is None else NamedSharding(layout.mesh, P(*lane, *(None,) * axis, MODEL))

    shardings = jax.tree.map(lambda _: whole, like)
    methods = {
        name: split(tree) if name in OF_CLIENTS else shardings.methods[name] for name, tree in like.methods.items()
    }
    merged = jax.tree.map(of_matrix, like.merged)
    return dataclasses.replace(shardings, merged=merged, clients=split(like.clients), methods=methods)
