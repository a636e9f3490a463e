"""Examples of a batch side by side, so that nothing is computed on padding.

A batch of text is `[B, S]`, and most of it is padding. Packed, its real positions lie one after another in G rows of P
places, each example whole in one row, and attention looks at no other example, see `core.learning.Places`. A program
has a fixed shape, so it holds a few widths P, and each batch takes the least that holds it; a batch that none holds
stays as it is. What is computed is the same for each of them, but for the order of sums.

Attention costs P for each position where it costs S unpacked, so fewer and longer rows waste fewer places and make
attention dearer. Rows and widths are those of which random batches of the pool are expected to take the least.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from fedjax_lora.core.types import IGNORED, Batch, Packing

ATTENTION = 500
"""Width of rows at which attention takes as long as all else. Measured for a model width of 384 on a CPU."""

WIDTHS = 6
"""Most widths. Our choice: each is a program more to compile."""

CANDIDATES = 12
"""Widths that these are chosen from, which hold equal shares more of random batches."""

SPARE = 1.1
"""The widest row over the longest of the random batches: a longer one is computed as it is, at the cost of padding."""

DRAWS, LEAST_DRAWS = 1000, 100
"""Random batches by which rows and widths are chosen, and the least number of those that are computed together."""

WORTH = 0.9
"""Most that packed batches may be expected to take, in shares of what padded ones do."""

MULTIPLE = 4
"""Widths are multiples of it, of which vectors are."""

PER_POSITION = {"input_ids": 0, "token_type_ids": 0, "target": IGNORED}
"""Leaves of a batch that are packed where they are `[B, S]`, and what they hold where there is no position."""

Found = TypeVar("Found")


def packing_of(mask: np.ndarray, batch_size: int, together: int = 1) -> Packing | None:
    """How random batches of a pool are best packed; None where that saves nothing.

    Args:
      mask: `[N, S]`, 1 for a real position.
      batch_size: B.
      together: batches that take one shape, since they are computed together.
    """
    num_examples, longest = mask.shape
    draws = together * max(DRAWS // together, LEAST_DRAWS)
    drawn = np.random.default_rng(0).integers(0, num_examples, (draws, batch_size))
    lengths = np.sort((mask > 0).sum(1)[drawn])[:, ::-1]
    divisors = [rows for rows in range(1, batch_size + 1) if batch_size % rows == 0]
    cost, packing = min(_best(lengths, rows, longest, together) for rows in divisors)
    return packing if cost <= WORTH * _cost(batch_size, longest) else None


def _best(lengths: np.ndarray, rows: int, longest: int, together: int) -> tuple[float, Packing]:
    """The widths of so many rows of which batches are expected to take the least, and what each takes.

    `lengths` are those of random batches, `[draws, B]`, each with its longest first.
    """
    dealt = lengths.reshape(len(lengths), -1, rows).copy()
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]  # as `deal` has it
    needed, padded = dealt.sum(1).max(1).reshape(-1, together).max(1), _cost(lengths.shape[1], longest)
    even = np.quantile(needed, np.arange(1, CANDIDATES + 1) / CANDIDATES)
    even[-1] *= SPARE
    widths = np.unique(MULTIPLE * np.ceil(even / MULTIPLE).astype(int))
    widths = widths[_cost(rows, widths) < padded]
    held = (needed[:, None] <= widths).mean(0)
    costs = np.array([*_cost(rows, widths), padded])

    def expected(chosen: tuple[int, ...]) -> float:
        return float(np.diff([0.0, *held[list(chosen)], 1.0]) @ costs[[*chosen, -1]])

    choices = itertools.combinations(range(len(widths)), min(WIDTHS, len(widths)))
    cost, chosen = min((expected(chosen), chosen) for chosen in choices)
    return cost, Packing(rows, tuple(int(widths[place]) for place in chosen))


def _cost(rows: int, width: Any) -> Any:
    """Of rows of so many places, in places without attention; of several widths at once, too."""
    return rows * width * (1 + width / ATTENTION)


def deal(lengths: Array, rows: int) -> tuple[Array, Array, Array]:
    """Deals the examples of a batch to rows: the longest first, forth and back.

    Args:
      lengths: `[B]` real positions of each.
      rows: G.

    Returns:
      the row and the first place in it of each example, `[B]` int32, and the places taken of each row, `[G]`.
    """
    turns = -(-lengths.shape[0] // rows)
    filled = jnp.pad(lengths, (0, turns * rows - lengths.shape[0]))
    order = jnp.argsort(-filled, stable=True) if turns > 1 else jnp.arange(rows)  # or each has a row of its own
    order = order.reshape(turns, rows)
    order = jnp.where((jnp.arange(turns) % 2 == 1)[:, None], order[:, ::-1], order)
    dealt = filled[order]
    stops = jnp.cumsum(dealt, 0)
    # Where each example was dealt, by a gather: the compiler of TPUs (libtpu 0.0.42) fails on the scatter of one turn.
    turn = jnp.argsort(order.ravel())[: lengths.shape[0]]
    row = jnp.broadcast_to(jnp.arange(rows, dtype=filled.dtype), order.shape).ravel()[turn]
    return row, (stops - dealt).ravel()[turn], stops[-1]


def pack(batch: Batch, real: Array, rows: int, width: int) -> dict[str, Array]:
    """The batch with its real positions in `[G, P]` places.

    Args:
      batch: leaves of PER_POSITION are packed, others stay.
      real: `[B, S]` bool, which positions are laid out. `attention_mask` is 1 where one lies, else 0.
      rows, width: G and P. No row may need more places.

    Returns:
      the batch, with `example_ids` and `position_ids` `[G, P]` and `first_places` `[B]` beside it: see
      `core.learning.Places`.
    """
    num_examples, longest = real.shape
    size, nowhere = num_examples * longest, rows * width
    row, start, _ = deal(real.sum(1), rows)
    first = row * width + start
    place = jnp.where(real, first[:, None] + jnp.cumsum(real, 1) - 1, nowhere)
    source = jnp.full(nowhere, size, jnp.int32).at[place.ravel()].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    source = source.reshape(rows, width)

    own = {name: batch[name].ravel() for name in PER_POSITION if name in batch and batch[name].shape == real.shape}
    return {
        **batch,
        **{name: jnp.take(leaf, source, mode="fill", fill_value=PER_POSITION[name]) for name, leaf in own.items()},
        "attention_mask": (source < size).astype(batch["attention_mask"].dtype),
        "example_ids": source // longest,
        "position_ids": source % longest,
        "first_places": jnp.minimum(first, nowhere - 1),
    }


def packed(packing: Packing | None, batch: Batch, weight: Array, work: Callable[[Batch], Found]) -> Found:
    """`work` on the batch in the least of the packing's shapes that holds it, or as it is.

    All batches that are mapped together, over clients or trials, take the shape that holds each of them. So the branch
    is one for all, and no other is computed; the more there are, the wider it is.

    Args:
      packing: None packs nothing.
      batch: `[B, S]`, with `attention_mask`.
      weight: `[B]`. Examples of weight 0 have no real position: what `work` finds of them is not to be used.
      work: its result has the same shapes whatever the shape of the batch.
    """
    if packing is None:
        return work(batch)
    mask = batch["attention_mask"]
    real = (mask > 0) & (weight > 0)[:, None]
    padded = {**batch, "attention_mask": mask * real.astype(mask.dtype)}
    rows, most = packing.rows, _cost(*mask.shape)
    widths = [width for width in packing.widths if _cost(rows, width) < most]
    if not widths:  # the batch is smaller than what was planned for
        return work(padded)
    needed = jnp.max(deal(real.sum(1), rows)[2])
    index = largest(jnp.searchsorted(jnp.asarray(widths), needed).astype(jnp.int32))
    branches = [lambda width=width: work(pack(batch, real, rows, width)) for width in widths]
    return lax.switch(index, [*branches, lambda: work(padded)])


@custom_vmap
def largest(value: Array) -> Array:
    """The value itself; under `vmap`, the largest of all, which has no batch axis."""
    return value


@largest.def_vmap
def _largest_of_all(axis_size: int, in_batched: list[bool], value: Array) -> tuple[Array, bool]:
    del axis_size
    return largest(jnp.max(value, 0) if in_batched[0] else value), False
