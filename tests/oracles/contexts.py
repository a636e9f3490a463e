"""Contexts that methods are made in, and one client's upload, where a test needs them without an experiment."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Sparsifier
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload
from fedjax_lora.sparsifiers.transforms import WireConfig, apply, chain


def context(like: Adapters | None = None, num_clients: int = 4, cohort_size: int = 4, **more: Any) -> Context:
    """Adapters of these shapes (or arrays), K clients, and a cohort of C; `more` are other fields of `Context`."""
    return Context(num_clients=num_clients, cohort_size=cohort_size, like=like, **more)


class Upload(NamedTuple):
    """One client's update from encoding to decoding.

    adapters, counted: as the server holds them. bits: Count. memory: of the client from then on.
    kept_ranks, dropped_energy: of the message.
    """

    adapters: Adapters
    counted: dict[str, Array]
    bits: Count
    kept_ranks: Array
    dropped_energy: Array
    memory: Any


def upload(method: Sparsifier, bits: Literal[32, 8, 4] = 32) -> Callable[..., Upload]:
    """`(start, trained, memory, kept, scope, key) -> Upload` of one client that is heard, at `bits` a value."""
    transforms = chain(WireConfig(bits=bits))

    def sent(start: Adapters, trained: Adapters, memory: Any, kept: ArrayLike, scope: Scope, key: Array) -> Upload:
        encode_key, transform_key = jax.random.split(key)
        message = method.encode(start, trained, memory, jnp.asarray(kept, jnp.float32), scope, encode_key)
        received = method.decode(start, apply(transforms, message, transform_key), scope)
        return Upload(
            adapters=received.adapters,
            counted=received.counted,
            bits=payload.bits(payload.message_size(message), transforms),
            kept_ranks=message.kept_ranks,
            dropped_energy=message.dropped_energy,
            memory=method.remember(trained, memory, received, scope),
        )

    return sent


def offered_bits(
    method: Sparsifier, start: Adapters, trained: Adapters, scope: Scope, bits: Literal[32, 8, 4] = 32
) -> np.ndarray:
    """`[R + 1]` int64 bits that are offered for k = 0 ... R ranks."""
    return payload.bits(method.offer(start, trained, scope).size, chain(WireConfig(bits=bits))).exact()
