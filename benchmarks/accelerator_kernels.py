"""The part `kernels` of `accelerator.py`: every Pallas kernel beside XLA's program of the same meaning."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from accelerator_parts import timed

from fedjax_lora.core.types import Factors
from fedjax_lora.ops.lora_matmul import lora_matmul
from fedjax_lora.ops.masked_mean import masked_mean
from fedjax_lora.ops.rank_energy import rank_energy
from fedjax_lora.ops.rotate_ranks import rotate_ranks
from fedjax_lora.ops.soft_sparsify import soft_sparsify

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "pallas")


class Case(NamedTuple):
    """One kernel at one shape.

    call: `(implementation, *arrays) -> arrays`. shapes: of the arrays, float32; those of 1 axis are set to 1.
    bytes, flop: the least that it takes.
    same: outputs that have one value whoever computes them, of those of `call`.
    """

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    flop: int = 0
    same: Callable[[Any], Any] = lambda found: found


def cases(quick: bool) -> dict[str, Case]:
    """By kernel and shape."""
    found: dict[str, Case] = {}
    clients, layers = (4, 2) if quick else (256, 12)
    for width, rank in ((32, 8),) if quick else ((768, 8), (768, 16), (4096, 16)):
        some = clients if width < 4096 else clients // 4
        found[f"soft_sparsify, {some} x {layers} x {width}, rank {rank}"] = _soft(some, layers, width, rank, None)
        packed = _soft(some, layers, width, rank, rank // 2)
        found[f"soft_sparsify packed, {some} x {layers} x {width}, rank {rank}"] = packed
        found[f"masked_mean, {some} x {layers} x {width}, rank {rank}"] = _mean(some, layers, width, rank)
    for width, rank in ((32, 8),) if quick else ((768, 8), (768, 64)):
        changes = clients * layers
        found[f"rank_energy, {changes} x {width}, rank {rank}"] = _energy(changes, width, rank)
        found[f"rotate_ranks, {changes} x {width}, rank {rank}"] = _rotate(changes, width, rank)
    shapes = ((4, 16, 32, 48, 8),) if quick else MATMULS
    return found | {f"lora_matmul, {shape}": _matmul(*shape) for shape in shapes}


MATMULS = ((256, 512, 768, 768, 8), (256, 512, 384, 384, 8), (64, 512, 768, 3072, 16), (64, 512, 3072, 768, 64))
"""Clients, rows of each, widths and rank."""


def _soft(clients: int, layers: int, width: int, rank: int, slots: int | None) -> Case:
    def call(implementation: Implementation, a: Any, b: Any, a0: Any, b0: Any) -> Any:
        kept, ranks = jnp.full(clients, rank // 2, jnp.float32), jnp.ones((clients, rank))
        return soft_sparsify(Factors(a, b), Factors(a0, b0), kept, ranks, slots=slots, implementation=implementation)

    shapes = (
        (clients, layers, width, rank),
        (clients, layers, rank, width),
        (layers, width, rank),
        (layers, rank, width),
    )
    one = 4 * 2 * layers * width * rank
    return Case(call, shapes, (clients + 1) * one + clients * one * (slots or rank) // rank)


def _mean(clients: int, layers: int, width: int, rank: int) -> Case:
    def call(implementation: Implementation, old: Any, x: Any, weights: Any) -> Any:
        return masked_mean(old, x, weights, axis=-2, implementation=implementation)

    shapes = (layers, width, rank), (clients, layers, width, rank), (clients, layers, rank)
    return Case(call, shapes, 4 * (clients + 2) * layers * width * rank)


def _energy(changes: int, width: int, rank: int) -> Case:
    def call(implementation: Implementation, x: Any, x0: Any) -> Any:
        return rank_energy(x, x0, axis=-2, implementation=implementation)

    return Case(call, ((changes, width, rank),) * 2, 4 * 2 * changes * width * rank)


def _rotate(changes: int, width: int, rank: int) -> Case:
    def call(implementation: Implementation, x: Any) -> Any:
        return rotate_ranks([x], jnp.ones(rank), implementation=implementation)

    flop = 2 * changes * width * rank * rank
    return Case(call, ((changes, width, rank),), 4 * changes * width * rank, flop, lambda found: found[0].energies)


def _matmul(clients: int, rows: int, n_in: int, n_out: int, rank: int) -> Case:
    """Forward, and backward to the rows and the factors, in bfloat16."""

    def call(implementation: Implementation, x: Any, w: Any, a: Any, b: Any) -> Any:
        def total(x: Any, factors: Factors) -> jax.Array:
            y = lora_matmul(x, w.astype(jnp.bfloat16), factors, implementation=implementation)
            return jnp.sum(y * y)

        return jax.grad(total, argnums=(0, 1))(x, Factors(a, b))

    shapes = (clients, rows, n_in), (n_in, n_out), (clients, n_in, rank), (clients, rank, n_out)
    narrow = clients * rows * rank * (n_in + n_out)
    flop = 2 * (2 * clients * rows * n_in * n_out + 3 * narrow)
    return Case(call, shapes, 4 * 2 * clients * rows * (n_in + n_out), flop)


def kernels(model: str, quick: bool) -> dict[str, Any]:
    """Each case in both implementations: seconds, GB/s and TFLOP/s of the least, and how far apart the results are."""
    del model
    return {name: _row(case) for name, case in cases(quick).items()}


def _row(case: Case) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(case.shapes))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, case.shapes, strict=True)]
    row: dict[str, Any] = {"bytes": case.bytes, "flop": case.flop}
    results = []
    for implementation in IMPLEMENTATIONS:
        program = jax.jit(functools.partial(case.call, implementation))
        try:
            seconds = timed(program, *arrays)
            results.append(case.same(program(*arrays)))
        except Exception as error:  # what a compiler refuses is a result
            row[implementation] = {"error": str(error).splitlines()[0][:300]}
            continue
        rates = {"gb_per_s": case.bytes * 1e-9 / seconds, "tflops": case.flop * 1e-12 / seconds}
        row[implementation] = {"call_s": seconds, **rates}
    if len(results) == len(IMPLEMENTATIONS):
        row["xla_over_pallas"] = row["xla"]["call_s"] / row["pallas"]["call_s"]
        row["largest_relative_difference"] = max(map(_apart, *map(jax.tree.leaves, results)))
    return row


def _apart(x: jax.Array, y: jax.Array) -> float:
    """The largest difference over the largest value."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return float(jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30))
