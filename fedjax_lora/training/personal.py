"""Parts of the adapters that stay with a client: its own b, say, under a shared a."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lora.adapters.lora import max_rank, rank_mask
from fedjax_lora.core.types import Adapters, ClientState, Factors


def extract(adapters: Adapters, parts: Sequence[str]) -> dict[str, Any]:
    """The leaves of these parts ("a", "b", "head"), by part."""
    personal: dict[str, Any] = {}
    for part in parts:
        personal[part] = adapters.head if part == "head" else {n: getattr(f, part) for n, f in adapters.modules.items()}
    return personal


def compose(adapters: Adapters, personal: dict[str, Any]) -> Adapters:
    """The adapters with a client's own leaves in place of the shared ones."""
    modules = {
        name: Factors(
            a=personal["a"][name] if "a" in personal else f.a, b=personal["b"][name] if "b" in personal else f.b
        )
        for name, f in adapters.modules.items()
    }
    return Adapters(modules=modules, head=personal.get("head", adapters.head))


def deployed(adapters: Adapters, clients: ClientState) -> Adapters:
    """The adapters that a newcomer would be given, of the global ones and the state of all K clients.

    Personal parts are their mean over the clients. A rank that all have pruned away is no part of any client's model.
    """
    whole = compose(adapters, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), clients.personal))
    in_use = rank_mask(jnp.max(clients.rank), max_rank(whole))
    modules = {name: Factors(a=f.a, b=f.b * in_use[:, None]) for name, f in whole.modules.items()}
    return Adapters(modules=modules, head=whole.head)
