"""Parts of the adapters that stay with a client: its own b, say, under a shared a."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core.types import Adapters, ClientState, Factors


def extract(adapters: Adapters, parts: Sequence[str]) -> dict[str, Any]:
    """The leaves of these parts ("a", "b", "head"), by part."""
    kept: dict[str, Any] = {}
    for part in parts:
        kept[part] = adapters.head if part == "head" else {n: getattr(f, part) for n, f in adapters.modules.items()}
    return kept


def compose(adapters: Adapters, kept: dict[str, Any]) -> Adapters:
    """The adapters with a client's own leaves in place of the shared ones."""
    modules = {
        name: Factors(a=kept["a"][name] if "a" in kept else f.a, b=kept["b"][name] if "b" in kept else f.b)
        for name, f in adapters.modules.items()
    }
    return Adapters(modules=modules, head=kept.get("head", adapters.head))


def deployed(adapters: Adapters, clients: ClientState) -> Adapters:
    """The adapters that a newcomer would be given, of the global ones and the state of all K clients.

    The parts that clients keep are their mean. A rank that all have pruned away is no part of any client's model.
    """
    whole = compose(adapters, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), clients.kept))
    in_use = rank_mask(jnp.max(clients.rank), max_rank(whole))
    modules = {name: Factors(a=f.a, b=f.b * in_use[:, None]) for name, f in whole.modules.items()}
    return Adapters(modules=modules, head=whole.head)
