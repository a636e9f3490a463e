"""Parts of the adapters that stay with a client: its own b, say, under a shared a."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lora.base import Adapters, Factors


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


def deployed(adapters: Adapters, kept: dict[str, Any]) -> Adapters:
    """The adapters that a newcomer would be given: the shared parts with the mean over all clients of the kept ones.

    kept: part -> leaves `[K, ...]`; `{}` where nothing is kept.
    """
    return compose(adapters, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), kept))
