"""A frozen projection and its adapter for many clients, whose narrow factors lie side by side.

Eight ranks fill a sixteenth of the 128 columns of a TPU's matrix unit, and padded to them in memory a factor takes
sixteen times its bytes. So the factors of several clients stand one below the other, with their width along the
lanes, and of the product with all of them each client keeps its own columns.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from fedjax_lora_kernels.targets import LANES, Target, cost, options, power_of_two, stretch

LEAST = 16
"""Rows of the factors side by side: fewer are no operand of a matrix unit."""

WEIGHT_BYTES = 2**23
"""Of the frozen matrix that one program of a TPU holds."""

ROWS_BYTES = 2**22
"""Of the clients' activations that one program of a TPU holds."""


class Blocks(NamedTuple):
    """What one program works on.

    clients: whose factors are side by side. rows: of each client's activations. inner: of what is summed at once.
    columns: of the product.
    """

    clients: int
    rows: int
    inner: int
    columns: int


def blocks_of(shape: tuple[int, ...], columns: int, ranks: int, target: Target) -> Blocks:
    """The blocks of activations `[C, T, n]` times `[n, columns]` with factors of so many ranks."""
    clients, rows, inner = shape
    if target == "gpu":  # whose products have at least 16 rows and columns
        together = power_of_two(clients, max(LEAST // ranks, 1))
        return Blocks(together, power_of_two(rows, 64), power_of_two(inner, 64), power_of_two(columns, 64))
    together = max(min(LANES // ranks, clients), 1)
    most = max(ROWS_BYTES // (4 * together * (inner + columns)), 16)
    return Blocks(
        together, min(16 * pl.cdiv(rows, 16), most // 16 * 16), inner, stretch(columns, WEIGHT_BYTES // (4 * inner))
    )


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _own(narrow: Array, clients: int, ranks: int) -> Array:
    """`[clients * rows, clients * R or more]` with zeros in the columns of other clients."""
    rows, columns = narrow.shape
    shape = clients, rows // clients, columns
    first = lax.broadcasted_iota(jnp.int32, shape, 0) * ranks
    column = lax.broadcasted_iota(jnp.int32, shape, 2)
    own = (column >= first) & (column < first + ranks)
    return jnp.where(own.reshape(rows, columns), narrow, 0.0)


def _flat(x: Array) -> Array:
    """The rows of all clients, one below the other."""
    return x.reshape(-1, x.shape[-1])


def _project(x_ref, w_ref, a_ref, b_ref, y_ref, *, ranks: int, inner: int, transposed: bool) -> None:
    dtype, (clients, rows, columns) = w_ref.dtype, y_ref.shape

    def add(where, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        x = _flat(x_ref[:, :, where].astype(dtype))
        w = w_ref[:, where] if transposed else w_ref[where, :]
        wide = sums[0] + _dot(x, w, (1, 1 if transposed else 0))
        return wide, sums[1] + _dot(x, a_ref[:, where].astype(dtype), (1, 1))

    sums = jnp.zeros((clients * rows, columns)), jnp.zeros((clients * rows, a_ref.shape[0]))
    count = x_ref.shape[2] // inner
    if count == 1:
        y, narrow = add(slice(None), sums)
    else:
        y, narrow = lax.fori_loop(0, count, lambda i, sums: add(pl.ds(i * inner, inner), sums), sums)
    y += _dot(_own(narrow, clients, ranks).astype(dtype), b_ref[...].astype(dtype), (1, 0))
    y_ref[...] = y.reshape(y_ref.shape)


def _gradients(
    x_ref, g_ref, a_ref, b_ref, da_ref, db_ref, *, clients: int, rows: int, ranks: int, dtype: DTypeLike
) -> None:
    shape = x_ref.shape[:2]
    client = lax.broadcasted_iota(jnp.int32, (*shape, 1), 0) + pl.program_id(0) * shape[0]
    place = lax.broadcasted_iota(jnp.int32, (*shape, 1), 1) + pl.program_id(1) * shape[1]
    real = (client < clients) & (place < rows)  # beyond the edge anything may be read
    x, g = (_flat(jnp.where(real, ref[...], 0.0).astype(dtype)) for ref in (x_ref, g_ref))
    of_x, of_g = (
        _own(_dot(wide, ref[...].astype(dtype), (1, 1)), shape[0], ranks).astype(dtype)
        for wide, ref in ((x, a_ref), (g, b_ref))
    )

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        da_ref[...], db_ref[...] = jnp.zeros(da_ref.shape), jnp.zeros(db_ref.shape)

    da_ref[...] += _dot(of_g, x, (0, 0))
    db_ref[...] += _dot(of_x, g, (0, 0))


def _groups(factors: Array, clients: int) -> Array:
    """`[C, R, n]` -> `[groups, clients * R, n]`, filled with zeros to whole groups of at least LEAST rows."""
    count, ranks, width = factors.shape
    filled = jnp.pad(factors, ((0, -count % clients), (0, 0), (0, 0))).reshape(-1, clients * ranks, width)
    return jnp.pad(filled, ((0, 0), (0, max(LEAST - clients * ranks, 0)), (0, 0)))


@functools.partial(jax.jit, static_argnames=("transposed", "target"))
def lora_matmul(x: Array, w: Array, a: Array, b: Array, *, transposed: bool = False, target: Target) -> Array:
    """`x w + (x a^T) b` for every client; products in the dtype of `w`, sums in float32.

    With `w` transposed and the factors exchanged it is its own gradient to x.

    Floor: x read and y written, 4 bytes a number, and w once; 2 T n_in n_out FLOP a client, and 2 T R (n_in + n_out)
    for its adapter. A TPU, whose matrix unit has 128 columns, takes the time of 2 T 128 (n_in + n_out) for the latter,
    for one rank as for 128.

    Args:
      x: `[C, T, n_in]`.
      w: `[n_in, n_out]`; `[n_out, n_in]` where transposed.
      a: `[C, R, n_in]`, the ranks as rows.
      b: `[C, R, n_out]`.
      transposed: see w.
      target: what it is compiled for; a GPU wants powers of two as R and in C and T a factor of 16.

    Returns:
      `[C, T, n_out]` float32.
    """
    (clients, rows, inner), ranks, columns = x.shape, a.shape[1], b.shape[2]
    block = blocks_of(x.shape, columns, ranks, target)
    whole, narrow = inner, max(block.clients * ranks, LEAST)
    if transposed:
        of_w = pl.BlockSpec((block.columns, whole), lambda group, i, j: (j, 0))
    else:
        of_w = pl.BlockSpec((whole, block.columns), lambda group, i, j: (0, j))
    a, b = _groups(a, block.clients), _groups(b, block.clients)
    y = jax.ShapeDtypeStruct((clients, rows, columns), jnp.float32)
    flop = 2 * clients * rows * (inner * columns + narrow * (inner + columns))
    return pl.pallas_call(
        functools.partial(_project, ranks=ranks, inner=block.inner, transposed=transposed),
        out_shape=y,
        grid=(pl.cdiv(clients, block.clients), pl.cdiv(rows, block.rows), pl.cdiv(columns, block.columns)),
        in_specs=[
            pl.BlockSpec((block.clients, block.rows, whole), lambda group, i, j: (group, i, 0)),
            of_w,
            pl.BlockSpec((None, narrow, whole), lambda group, i, j: (group, 0, 0)),
            pl.BlockSpec((None, narrow, block.columns), lambda group, i, j: (group, 0, j)),
        ],
        out_specs=pl.BlockSpec((block.clients, block.rows, block.columns), lambda group, i, j: (group, i, j)),
        cost_estimate=cost(flop, (x, w, a, b, y)),
        name="lora_matmul",
        **options(target),
    )(x, w, a, b)


@functools.partial(jax.jit, static_argnames=("dtype", "target"))
def lora_gradients(
    x: Array, g: Array, a: Array, b: Array, *, dtype: DTypeLike, target: Literal["tpu", "cpu"]
) -> tuple[Array, Array]:
    """Gradients of `lora_matmul` to the factors of every client; g is that to its result.

    Programs of one group of clients follow one another and add to the same sums, as they do on a TPU; not for a GPU,
    whose programs have no order.

    Floor: x and g read once, 4 bytes a number; 4 T R (n_in + n_out) FLOP a client, of which a TPU takes the time of
    128 ranks for any fewer.

    Args:
      x, g: `[C, T, n_in]` and `[C, T, n_out]`.
      a, b: `[C, R, n_in]` and `[C, R, n_out]`, the ranks as rows.
      dtype: in which the products multiply.
      target: what it is compiled for.

    Returns:
      `[C, R, n_in]` and `[C, R, n_out]`, float32.
    """
    (clients, rows, inner), ranks, columns = x.shape, a.shape[1], b.shape[2]
    block = blocks_of(x.shape, columns, ranks, target)
    widths, narrow = (inner, columns), max(block.clients * ranks, LEAST)
    groups = pl.cdiv(clients, block.clients)
    of_rows = [pl.BlockSpec((block.clients, block.rows, width), lambda group, i: (group, i, 0)) for width in widths]
    of_factors = [pl.BlockSpec((None, narrow, width), lambda group, i: (group, 0, 0)) for width in widths]
    a, b = _groups(a, block.clients), _groups(b, block.clients)
    flop = 4 * clients * rows * narrow * (inner + columns)
    sums = pl.pallas_call(
        functools.partial(_gradients, clients=clients, rows=rows, ranks=ranks, dtype=dtype),
        out_shape=[jax.ShapeDtypeStruct((groups, narrow, width), jnp.float32) for width in widths],
        grid=(groups, pl.cdiv(rows, block.rows)),
        in_specs=[*of_rows, *of_factors],
        out_specs=of_factors,
        cost_estimate=cost(flop, (x, g, a, b, a, b)),
        name="lora_gradients",
        **options(target),
    )(x, g, a, b)
    used = block.clients * ranks
    da, db = (s[:, :used].reshape(-1, ranks, s.shape[-1])[:clients] for s in sums)
    return da, db
