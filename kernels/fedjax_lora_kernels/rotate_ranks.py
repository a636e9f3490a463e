"""Gram matrices of many factors and their eigenvectors, by Jacobi rotations, in one launch."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fedjax_lora_kernels.small import diagonal, number, position, row
from fedjax_lora_kernels.targets import Target, cost, options, power_of_two

MAX_RANK = 64
"""Most ranks: the rotations of a sweep grow with their square."""

TOGETHER = 8
"""Factors that one program of a TPU works on side by side, where they fit its memory."""

BLOCK_BYTES = 2**22
"""Of the factors that one program of a TPU holds."""


def _dot(x: Array, y: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product of two matrices in full float32; by the matrix unit where they are large enough for that of a GPU."""
    if min(*x.shape, *y.shape) < 16:
        x, y = (x if contract[0] == 1 else x.T), (y if contract[1] == 0 else y.T)
        return jnp.sum(x[:, :, None] * y[None, :, :], axis=1)
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, axes, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _rotation(gram: Array, step: Array) -> tuple[Array, Array]:
    """`[R, R]` J and J^T, so that J^T G J is zero at the pairs of this step: each rank is in one of them at most.

    Pairs are those of a round-robin tournament: of an even number m of ranks (or one more than there are) the last
    one meets `step`, and i meets j where i + j = 2 step modulo m - 1. A rank that meets none stays.
    """
    size = gram.shape[0]
    players = size + size % 2
    i, j = number((size, size), 0), number((size, size), 1)
    last = players - 1

    def partner(one: Array) -> Array:
        met = lax.rem(2 * step + 2 * last - one, last)
        met = jnp.where(met == one, last, met)
        return jnp.where(one == last, step, met)

    meets = partner(i) == j
    own, off = jnp.where(i == j, gram, 0.0), jnp.where(meets, gram, 0.0)
    p = jnp.sum(own, axis=1, keepdims=True)
    others = jnp.sum(jnp.where(meets, row(p), 0.0), axis=1, keepdims=True)
    g = jnp.sum(off, axis=1, keepdims=True)
    # The tangent of the smaller angle: t = sign(d) / (|d| + sqrt(d^2 + 1)), d = (G_jj - G_ii) / (2 G_ij), for the
    # first of the pair, and -t for the second. Scaled so that nothing overflows where G_ij is small.
    first = jnp.sum(jnp.where(meets & (j > i), 1.0, 0.0), axis=1, keepdims=True) > 0.0
    difference = jnp.where(first, others - p, p - others)
    root = jnp.abs(difference) + jnp.sqrt(difference * difference + 4.0 * g * g)
    t = jnp.where(difference >= 0.0, 2.0, -2.0) * g / jnp.where(root > 0.0, root, 1.0)
    t = jnp.where(root > 0.0, t, 0.0)
    cosine = lax.rsqrt(1.0 + t * t)
    sine = t * cosine
    off = jnp.where(meets, jnp.where(first, sine, -sine), 0.0)
    return jnp.where(i == j, cosine, off), jnp.where(i == j, cosine, -off)


def _turn(count: Array, gram: Array, vectors: Array) -> tuple[Array, Array]:
    """The Gram matrix and the vectors after the step of this number."""
    size = gram.shape[0]
    rotation, transposed = _rotation(gram, lax.rem(count, size + size % 2 - 1))
    return _dot(transposed, _dot(gram, rotation)), _dot(vectors, rotation)


def _begin(gram: Array, unused: Array) -> tuple[Array, Array]:
    """The Gram matrix as it is diagonalised, and the first vectors."""
    # At unit trace, accuracy is the same at every scale. Unused ranks move from eigenvalue 0 to -1: they come last.
    own = jnp.where(diagonal(gram.shape[0]), gram, 0.0)
    energy = jnp.sum(jnp.sum(own, axis=1, keepdims=True), axis=0, keepdims=True)
    scaled = gram / jnp.where(energy > 0.0, energy, 1.0)
    identity = jnp.where(diagonal(gram.shape[0]), 1.0, 0.0)
    return scaled - identity * unused, identity


def _end(gram: Array, turned: Array, vectors: Array) -> tuple[Array, Array]:
    """Energies `[1, R]`, the largest first, and their vectors as columns, of a Gram matrix and its diagonal form."""
    size = gram.shape[0]
    # Many products have been rounded: one step of Newton's method makes the vectors orthonormal again.
    identity = jnp.where(diagonal(size), 1.0, 0.0)
    vectors = _dot(1.5 * identity - 0.5 * _dot(vectors, vectors, (1, 1)), vectors)
    energy = jnp.sum(jnp.sum(jnp.where(diagonal(size), gram, 0.0), axis=1, keepdims=True), axis=0, keepdims=True)
    values = jnp.sum(jnp.where(diagonal(size), turned, 0.0), axis=1, keepdims=True)
    place = position(values)
    # Column i goes to its place: a product with a permutation matrix.
    order = place == number((size, size), 1).astype(place.dtype)
    ordered = jnp.sum(jnp.where(order, values, 0.0), axis=0, keepdims=True)
    return jnp.maximum(ordered, 0.0) * energy, _dot(vectors, jnp.where(order, 1.0, 0.0))


def _steps(size: int) -> int:
    return (size + size % 2 - 1) * (4 + size.bit_length() // 2)


def _one(x_ref, unused_ref, energy_ref, rotation_ref, *, block: int) -> None:
    """One factor, whose matrices are held in registers."""
    size, width = x_ref.shape

    def add(i: Array, gram: Array) -> Array:
        x = x_ref[:, pl.ds(i * block, block)]
        return gram + _dot(x, x, (1, 1))

    gram = lax.fori_loop(0, width // block, add, jnp.zeros((size, size)))
    turn = lambda count, carry: _turn(count, *carry)  # noqa: E731
    energy_ref[...], rotation_ref[...] = _end(
        gram, *lax.fori_loop(0, _steps(size), turn, _begin(gram, unused_ref[...]))
    )


def _several(x_ref, unused_ref, energy_ref, rotation_ref, gram_ref, vectors_ref) -> None:
    """Several factors side by side, whose matrices are held in the memory of a TPU: its compiler fails in registers."""
    x = x_ref[...]
    axes = (((2,), (2,)), ((0,), (0,)))
    gram = lax.dot_general(x, x, axes, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    gram_ref[...], vectors_ref[...] = jax.vmap(_begin)(gram, unused_ref[...])

    def turn(count: Array, carry: int) -> int:
        gram_ref[...], vectors_ref[...] = jax.vmap(_turn, (None, 0, 0))(count, gram_ref[...], vectors_ref[...])
        return carry

    lax.fori_loop(0, _steps(x.shape[1]), turn, 0)
    energy_ref[...], rotation_ref[...] = jax.vmap(_end)(gram, gram_ref[...], vectors_ref[...])


@functools.partial(jax.jit, static_argnames=("target",))
def rotate_ranks(x: Array, ranks: Array, *, target: Target) -> tuple[Array, Array]:
    """The orthogonal components of each factor's ranks, largest first: eigenvectors of its Gram matrix.

    Each program forms Gram matrices and diagonalises them where they lie. Rotations of a step are disjoint, so that
    a step is three products of small matrices; the number of sweeps is fixed.

    Floor: every factor read once, 4 bytes and 2 R FLOP a number, and `[R, R]` written. The rotations take
    6 R^3 (R - 1) FLOP a sweep, in products that are too small to fill a matrix unit.

    Args:
      x: `[M, R, n]`, R at most 64, 0 in ranks that are not in use.
      ranks: `[M, R]`, 1 for those in use.
      target: what it is compiled for; a GPU wants a power of two as R.

    Returns:
      energies `[M, R]`, and rotations `[M, R, R]` with the components as columns; ranks not in use come last.
    """
    factors, size, width = x.shape
    if size > MAX_RANK:
        raise ValueError(f"the rank must be at most {MAX_RANK}, got {size}")
    unused = 1.0 - ranks[:, None, :]
    kernel, together, scratch = functools.partial(_one, block=power_of_two(width, 128)), None, []
    if target == "tpu":
        together = min(factors, TOGETHER, max(BLOCK_BYTES // (4 * size * width), 1))
        kernel, scratch = _several, [tpu.VMEM((together, size, size), jnp.float32)] * 2

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((together, *shape), lambda i: (i, 0, 0))

    out = [jax.ShapeDtypeStruct((factors, rows, size), jnp.float32) for rows in (1, size)]
    flop = 2 * size * x.size + factors * _steps(size) * 6 * size**3
    energies, rotations = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(pl.cdiv(factors, together or 1),),
        in_specs=[block(size, width), block(1, size)],
        out_specs=[block(1, size), block(size, size)],
        scratch_shapes=scratch,
        cost_estimate=cost(flop, (x, *out), roots=2 * factors * _steps(size) * size),
        name="rotate_ranks",
        **options(target),
    )(x, unused)
    return energies[:, 0], rotations
