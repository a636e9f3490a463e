"""Calls of every kernel, as `(function, shapes)`, for what is compiled without being run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lora.core.types import Factors
from fedjax_lora.ops.lora_matmul import lora_matmul
from fedjax_lora.ops.masked_mean import masked_mean, packed_mean
from fedjax_lora.ops.rank_energy import rank_energy
from fedjax_lora.ops.rotate_ranks import rotate_ranks
from fedjax_lora.ops.soft_sparsify import soft_sparsify


class Call(NamedTuple):
    """function: of arrays. shapes: of them, `jax.ShapeDtypeStruct`."""

    function: Callable
    shapes: tuple


class Size(NamedTuple):
    """Clients, layers, rows of activations, widths and ranks, and slots of packed changes."""

    clients: int
    layers: int
    rows: int
    n_in: int
    n_out: int
    ranks: int
    slots: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


def _array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _sparse(slots: int | None) -> Callable:
    def run(trained: Factors, start: Factors, kept: jax.Array, ranks: jax.Array):
        return soft_sparsify(trained, start, kept, ranks, slots=slots, implementation="pallas")

    return run


def _training(dtype) -> Callable:
    def run(x: jax.Array, w: jax.Array, factors: Factors):
        def total(x: jax.Array, factors: Factors) -> jax.Array:
            y = lora_matmul(x, w.astype(dtype), factors, implementation="pallas")
            return jnp.sum(y * y)

        return jax.value_and_grad(total, argnums=(0, 1))(x, factors)

    return run


def calls(size: Size) -> dict[str, Call]:
    """Name -> call of each kernel at this size."""
    clients, layers, rows, n_in, n_out, ranks, slots = size
    of_a, of_b = (layers, n_in, ranks), (layers, ranks, n_out)
    start, trained = Factors(_array(*of_a), _array(*of_b)), Factors(_array(clients, *of_a), _array(clients, *of_b))
    sparse = trained, start, _array(clients), _array(clients, ranks)
    by_layer, by_slot = _array(clients, layers, ranks), (clients, layers, slots)
    rows_of = _array(clients, rows, n_in), _array(n_in, n_out)
    own = Factors(_array(clients, n_in, ranks), _array(clients, ranks, n_out))
    return {
        "rank_energy of a": Call(lambda x, y: rank_energy(x, y, axis=-2, implementation="pallas"), (start.a,) * 2),
        "rank_energy of b": Call(lambda x, y: rank_energy(x, y, axis=-1, implementation="pallas"), (start.b,) * 2),
        "soft_sparsify in place": Call(_sparse(None), sparse),
        "soft_sparsify packed": Call(_sparse(slots), sparse),
        "masked_mean of a": Call(
            lambda old, x, w: masked_mean(old, x, w, axis=-2, implementation="pallas"), (start.a, trained.a, by_layer)
        ),
        "masked_mean of b": Call(
            lambda old, x, w: masked_mean(old, x, w, axis=-1, implementation="pallas"), (start.b, trained.b, by_layer)
        ),
        "packed_mean": Call(
            lambda old, x, index, w: packed_mean(old, x, index, w, implementation="pallas"),
            (start.b, _array(*by_slot, n_out), _array(*by_slot, dtype=jnp.int32), _array(*by_slot)),
        ),
        "rotate_ranks": Call(
            lambda x, mask: rotate_ranks([x], mask, implementation="pallas"),
            (_array(clients * layers, n_in, ranks), _array(ranks)),
        ),
        "lora_matmul in float32": Call(_training(jnp.float32), (*rows_of, own)),
        "lora_matmul in bfloat16": Call(_training(jnp.bfloat16), (*rows_of, own)),
    }
