"""Where the state of a run lives: which of its axes are split over which axes of the mesh of devices."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding

from fedjax_lora.core.types import FedState
from fedjax_lora.sim.cohort import CLIENTS, TRIALS, replicated, split_over
from fedjax_lora.sim.parts import Layout

OF_CLIENTS = ("wireless",)
"""The states of methods whose leaves are `[K, ...]`, beside `FedState.clients`."""


def state_shardings(like: FedState, layout: Layout, lanes: bool = False) -> FedState:
    """The sharding of each leaf of a state.

    What is of each client is split over the mesh axis `clients`, where its devices divide K; all else is whole on each
    of them, as is everything where clients are worked on in order.

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

    shardings = jax.tree.map(lambda _: whole, like)
    methods = {
        name: split(tree) if name in OF_CLIENTS else shardings.methods[name] for name, tree in like.methods.items()
    }
    return dataclasses.replace(shardings, clients=split(like.clients), methods=methods)
