"""States by hand, with what a copy by value would lose."""

import jax
import jax.numpy as jnp
import optax

from fedjax_lora.core.types import Adapters, ClientState, Factors, FedState
from fedjax_lora.wireless.cell import CellState


def make_state(round_number, memory=()):
    def draw(i, *shape):
        return jax.random.normal(jax.random.key(10 * round_number + i), shape)

    # NaN and a negative zero: equal bits, not equal values.
    query = Factors(a=draw(0, 2, 3, 4), b=draw(1, 2, 4, 5).at[0, 0, :2].set(jnp.array([jnp.nan, -0.0])))
    adapters = Adapters(modules={"query": query}, head={"bias": draw(2, 3)})
    return FedState(
        key=jax.random.key(7),
        round=jnp.int32(round_number),
        numbers={"control.V": jnp.float32(3.0), "lora.client_ranks": jnp.arange(2.0)},
        adapters=adapters,
        merged={},
        elapsed_s=jnp.float32(jnp.inf),
        methods={
            "server": optax.sgd(0.1, momentum=0.9).init(adapters),
            "wireless": CellState(mean_gain=draw(3, 6), fading=draw(4, 6) * (1 + 2j), cpu_hz=draw(5, 6)),
            "control": {"queue_s": jnp.float32(0.1)},
            "drift": (),
        },
        clients=ClientState(rank=jnp.full(2, 4.0), personal={}, methods={"sparsifier": memory, "drift": ()}),
    )
