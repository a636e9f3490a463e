"""The frozen weights with all that has been merged into them."""

import jax.numpy as jnp
from jax import Array

from fedjax_lora.adapters.lora import add_to_base
from fedjax_lora.core.types import Adapters, Base, FedState
from fedjax_lora.sim.parts import Parts, World


def current_base(parts: Parts, world: World, state: FedState) -> Base:
    """Frozen weights of the round: the world's, and what the aggregator has merged so far."""
    return add_to_base(world.base, state.merged, parts.model.sites) if state.merged else world.base


def nothing_merged(like: Adapters) -> dict[str, Array]:
    """`FedState.merged` before the first round of an aggregator that merges."""
    return {name: jnp.zeros((f.a.shape[0], f.a.shape[1], f.b.shape[2])) for name, f in like.modules.items()}
