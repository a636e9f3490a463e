"""Small inputs for the laws: nothing is square, since square shapes hide a transpose.

DIMENSIONS names their sizes by the letters of `core.types`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Context, Observation, Radio, Received, Work
from fedjax_lora.core.types import Adapters, Factors, Scope

NUM_CLIENTS, COHORT_SIZE, NUM_LAYERS, MAX_RANK = 6, 4, 2, 4

DIMENSIONS = chex.Dimensions(K=NUM_CLIENTS, C=COHORT_SIZE, L=NUM_LAYERS, R=MAX_RANK)
"""Sizes of the examples by the letters of the glossary: `DIMENSIONS["CR"]` is the shape `[C, R]`."""

RANK = 3
"""Structural rank: below R, so that a rank that is not in use is among them."""

WIDTHS = {"query": (5, 7), "up": (8, 6)}
"""Module -> n_in, n_out."""

SCALE = 2.0
"""s = alpha / r."""

WEIGHTS = (0.4, 0.3, 0.2, 0.1)
"""p, of the clients of a cohort."""


def adapters(seed: int, ranks: int = RANK) -> Adapters:
    """Adapters whose first `ranks` components are random and whose others are zero in b."""

    def factors(key: Array, n_in: int, n_out: int) -> Factors:
        a_key, b_key = jax.random.split(key)
        used = (jnp.arange(MAX_RANK) < ranks)[:, None]
        a = jax.random.normal(a_key, (NUM_LAYERS, n_in, MAX_RANK))
        return Factors(a=a, b=used * jax.random.normal(b_key, (NUM_LAYERS, MAX_RANK, n_out)))

    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) + 1)
    modules = {name: factors(key, *widths) for (name, widths), key in zip(WIDTHS.items(), keys[1:], strict=True)}
    head = {"w": jax.random.normal(keys[0], (5, 3)), "b": jnp.zeros(3)}
    return Adapters(modules=modules, head=head)


def trained(seed: int, start: Adapters, scope: Scope) -> Adapters:
    """What a client may have trained from `start`: other than it in all that is in scope."""
    step = adapters(seed)
    return scope.select(jax.tree.map(lambda x, y: x + 0.3 * y, start, step), start)


def scope(rank: float = RANK, a: float = 1.0, b: float = 1.0, head: float = 1.0) -> Scope:
    """What is trained and sent."""
    ranks = (jnp.arange(MAX_RANK) < rank).astype(jnp.float32)
    return Scope(ranks, *map(jnp.float32, (a, b, head)))


def context(**more) -> Context:
    """Of an experiment with these shapes."""
    given: dict[str, Any] = {"num_clients": NUM_CLIENTS, "cohort_size": COHORT_SIZE, "num_classes": 3}
    return Context(**(given | {"like": jax.eval_shape(lambda: adapters(0))} | more))


def stack(trees: list) -> Any:
    """Trees as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def everything(clients: Adapters) -> Received:
    """Updates `[C, ...]` that have arrived as they are."""
    used = (jnp.arange(MAX_RANK) < RANK).astype(jnp.float32)
    return Received(clients, {name: jnp.broadcast_to(used, (COHORT_SIZE, NUM_LAYERS, MAX_RANK)) for name in WIDTHS})


def observation(seed: int = 0) -> Observation:
    """A cohort of which the last client is absent and the first is heard badly."""
    cohort, ranks = COHORT_SIZE, MAX_RANK
    snr_key, start_key, tail_key = jax.random.split(jax.random.key(seed), 3)
    heard = jnp.arange(cohort) < cohort - 1
    falls = jnp.sort(jax.random.uniform(tail_key, (cohort, RANK)), descending=True)
    tail = jnp.cumsum(jnp.pad(falls, ((0, 0), (0, ranks + 1 - RANK)))[:, ::-1], axis=1)[:, ::-1]
    kept = jnp.clip(jnp.arange(ranks + 1.0), 1.0, RANK)
    snr_hz = jnp.exp(13.0 + 3.0 * jax.random.uniform(snr_key, (cohort,))).at[0].divide(30.0)
    start_s = jnp.where(heard, jax.random.uniform(start_key, (cohort,)), 0.0)
    weights = jnp.where(heard, jnp.array(WEIGHTS), 0.0)
    return Observation(
        radio=Radio(snr_hz, start_s, jnp.float32(1e6), jnp.float32(0.01)),
        weights=weights / jnp.sum(weights),
        rank=jnp.full(cohort, float(RANK)),
        tail_energy=tail,
        bits=jnp.broadcast_to(2e4 * kept + 500.0, (cohort, ranks + 1)),
    )


def work(clients: int) -> Work:
    """Of clients that compute different numbers of examples."""
    return Work(samples=10.0 + jnp.arange(clients))
