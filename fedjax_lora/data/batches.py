"""Batches on the device: which rows of the pool a client reads, and in which order."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_lora.core import trees
from fedjax_lora.core.types import Dataset
from fedjax_lora.data.partition import Partition
from fedjax_lora.data.sampled import Sampled
from fedjax_lora.data.sources import Examples


def local_batches(key: Array, index_row: Array, count: Array, steps: int, batch_size: int) -> tuple[Array, Array]:
    """Rows of one client's batches in one round.

    The client's examples are put in one random order and walked through, around and around: none is read again
    before all were. A client with fewer than B examples reads each of them once a batch; the places left over have
    weight 0. The result does not depend on the padding of `index_row`.

    Args:
      key: of this client and round.
      index_row: `[n_max]` int32 rows of the pool; the first `count` are the client's.
      count: int32 scalar, its examples; 0 gives weight 0 throughout.
      steps: E, batches.
      batch_size: B.

    Returns:
      rows `[E, B]` int32, always valid, and weight `[E, B]` float32, 1 or 0.
    """
    own = jnp.arange(index_row.shape[0]) < count
    order = jnp.argsort(jnp.where(own, jax.random.uniform(key, index_row.shape), jnp.inf))
    filled = jnp.minimum(count, batch_size)
    step, slot = jnp.arange(steps)[:, None], jnp.arange(batch_size)
    position = (step * filled + slot) % jnp.maximum(count, 1)
    weight = jnp.broadcast_to(slot < filled, position.shape)
    return index_row[order[position]], weight.astype(jnp.float32)


def gather(pool: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Examples `rows [...]` of a pool with leaves `[N, ...]`: leaves `[..., ...]`."""
    return trees.take(dict(pool), rows)


def evaluation_batches(num_examples: int, batch_size: int, num_devices: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a whole pool in its order, `[M, B]` int32, and weight `[M, B]` float32.

    B is `batch_size`, or a device's share of the pool where that is less; M is the fewest batches that hold the pool,
    as many for each device. What they hold beyond it is filled up with row 0 at weight 0.
    """
    batch_size = min(batch_size, -(-num_examples // num_devices))
    num_batches = num_devices * -(-num_examples // (num_devices * batch_size))
    rows = np.arange(num_batches * batch_size, dtype=np.int32).reshape(num_batches, batch_size)
    own = rows < num_examples
    return np.where(own, rows, 0), own.astype(np.float32)


def federated_dataset(examples: Examples, partition: Partition) -> Dataset:
    """Puts the training pool, its partition and the test pool on the device.

    Raises:
      ValueError: the partition was made for a larger pool.
    """
    check_rows(partition, len(examples.train["label"]))
    return Dataset(
        train={name: jnp.asarray(value) for name, value in examples.train.items()},
        index=jax.tree.map(jnp.asarray, padded_index(partition)),
        count=jnp.asarray(partition.count),
        test={name: jnp.asarray(value) for name, value in examples.test.items()},
    )


def check_rows(partition: Partition, num_examples: int) -> None:
    """Raise ValueError where the partition was made for a larger pool than of so many examples."""
    rows = partition.index.by_label if isinstance(partition.index, Sampled) else partition.index
    if rows.max() >= num_examples:
        raise ValueError(f"partition must hold rows of the training pool, 0 to {num_examples - 1}, got {rows.max()}")


def padded_index(partition: Partition, width: int | None = None) -> np.ndarray | Sampled:
    """The rows of each client, `[K, width]`, by more of the rows that it has; those that are drawn stay as they are.

    None is the next power of two: the partitions of most seeds then fit one compiled program.
    """
    if isinstance(partition.index, Sampled):
        return partition.index
    longest = partition.index.shape[1]
    width = 2 ** math.ceil(math.log2(longest)) if width is None else width
    return np.pad(partition.index, ((0, 0), (0, width - longest)), mode="wrap")


def hold_out(data: Dataset, every: int) -> Dataset:
    """The data set with each client's every `every`-th example taken from it, to test on: nothing of `test` is left.

    Raises:
      ValueError: no client holds as many examples.
    """
    index, count = np.asarray(data.index), np.asarray(data.count)
    position = np.arange(index.shape[1])
    own, held = position < count[:, None], (position + 1) % every == 0
    rows = index[own & held]
    if not rows.size:
        raise ValueError(f"clients must hold {every} examples, to hold one out, got {count.max(initial=0)} at most")
    order = np.argsort(~(own & ~held), axis=1, kind="stable")
    return dataclasses.replace(
        data,
        index=jnp.asarray(np.take_along_axis(index, order, axis=1)),
        count=jnp.asarray((own & ~held).sum(1).astype(count.dtype)),
        test=gather(data.train, jnp.asarray(rows)),
    )
