"""Everything is sent: FedIT's uplink, and the reference of the other methods."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.methods import Sent, Sparsifier
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Scope
from fedjax_lora.sparsifiers import payload, ranks
from fedjax_lora.sparsifiers.wire import FLOAT32, Wire, arriving


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(Options):
    """Send all ranks, whatever the keep ratio; there is no regulariser to weigh."""

    orthogonality: ClassVar[float] = 0.0
    name: Literal["dense"] = "dense"


def make(config: DenseConfig, like: Adapters, wire: Wire = FLOAT32) -> Sparsifier:
    """The sparsifier that sends all r ranks of every module: `r (n_in + n_out)` values a matrix.

    Its tail energy is zero throughout, since nothing is ever left out.

    Args:
      config: its options.
      like: adapters, or their shapes.
      wire: how the changes of the numbers travel.
    """
    del config  # it has no option yet, but every method is made in the same way
    payload.check_fits(like)
    max_rank = ranks.max_rank(like)

    def payload_bits(keep_ratio: Array, scope: Scope) -> Array:
        return jnp.broadcast_to(payload.dense_bits(like, scope, wire).astype(jnp.float32), jnp.shape(keep_ratio))

    def compress(
        start: Adapters, trained: Adapters, memory: Any, keep_ratio: Array, scope: Scope, key: Array
    ) -> tuple[Sent, Any]:
        del keep_ratio
        decoded = arriving(wire, scope.select(trained, start), start, key)
        sent = Sent(
            adapters=decoded,
            counted=ranks.everywhere(scope.ranks, like),
            bits=payload.dense_bits(like, scope, wire),
            kept_ranks=jnp.sum(scope.ranks),
            dropped_energy=jnp.zeros(()),
        )
        return sent, memory

    return Sparsifier(
        broadcast=payload.dense_broadcast,
        tail_energy=lambda start, trained, scope: jnp.zeros(max_rank + 1),
        payload_bits=payload_bits,
        compress=compress,
    )
