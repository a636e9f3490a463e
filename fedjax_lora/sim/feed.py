"""Rounds whose training pool is on the host: the device holds what the cohorts of a segment need, and of the next one.

Who takes part is known before a segment begins, where nobody chooses clients by what a round shows of them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Sharding

from fedjax_lora.core import hosts
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.types import Dataset
from fedjax_lora.data.arrays import Pool
from fedjax_lora.data.batches import check_rows, padded_index
from fedjax_lora.data.partition import Partition
from fedjax_lora.data.pool import CohortRows, taken
from fedjax_lora.data.sampled import Sampled
from fedjax_lora.sim.evaluate import SCORED
from fedjax_lora.sim.parts import Layout, World
from fedjax_lora.sim.selection import sample


class Feed:
    """A training pool on the host, and which part of it a segment of rounds needs: always of the same shapes.

    Attributes:
      pool: name -> `[N, ...]`, memory-mapped or in memory.
      rounds: the most of a segment.
      clients: M, the most that take part in one.
      examples: P, the most that these clients hold.
    """

    def __init__(self, pool: Pool, partition: Partition, cohort_size: int, rounds: int):
        """`cohort_size` clients take part in a round.

        Raises:
          ValueError: the partition was made for a larger pool.
        """
        check_rows(partition, len(pool["label"]))
        self.pool, self.rounds = pool, rounds
        self._index, self._count = padded_index(partition), partition.count
        self.clients = min(len(self._count), rounds * cohort_size)
        most = int(np.sort(self._count)[-self.clients :].sum())
        self.examples = min(len(pool["label"]), most)

    def dataset(self, test: Pool) -> Dataset:
        """The data before the first segment: of the training pool there is the place alone."""
        number = min(len(self._count), SCORED) if isinstance(self._index, Sampled) else len(self._count)
        own = self._rows(np.arange(number))
        return Dataset(
            train=jax.tree.map(jnp.asarray, taken(self.pool, np.zeros(0, np.int32), self.examples)),
            index=CohortRows(
                ids=jnp.full(self.clients, len(self._count), jnp.int32),
                rows=jnp.zeros((self.clients, own.shape[-1]), jnp.int32),
                scored={"label": jnp.asarray(np.asarray(self.pool["label"])[own])},
            ),
            count=jnp.asarray(self._count),
            test=jax.tree.map(jnp.asarray, test),
        )

    def worlds(
        self, world: World, layout: Layout, key: Array, done: int, numbers: Sequence[int], everywhere: Sharding
    ) -> Iterator[World]:
        """The world of each segment, of which the next one's is made while a segment runs.

        Args:
          world: its data as `dataset` gives them, or of another segment.
          layout: of the work.
          key: of the run.
          done: rounds before the first segment.
          numbers: rounds of each segment, at most `rounds`.
          everywhere: the sharding of what each device holds whole.
        """
        words, starts = np.asarray(jax.random.key_data(key)), done + np.cumsum([0, *numbers])
        world = dataclasses.replace(world, data=dataclasses.replace(world.data, train={}))  # which is held no longer
        with ThreadPoolExecutor(1) as thread:

            def ask(segment: int) -> Any:
                # On the device, and so before the segment that runs beside the thread is on its way.
                ids, rows = self.cohorts(layout, words, int(starts[segment]), numbers[segment])
                return thread.submit(self._part, ids, rows, everywhere)

            following = map(ask, range(len(numbers)))  # each when it is its turn
            asked = next(following, None)
            while asked is not None:
                ready, asked = asked, next(following, None)
                train, ids, rows = ready.result()
                index = dataclasses.replace(world.data.index, ids=ids, rows=rows)
                yield dataclasses.replace(world, data=dataclasses.replace(world.data, train=train, index=index))
                del ready, train, ids, rows, index  # or three parts would be on the device

    def cohorts(self, layout: Layout, words: np.ndarray, done: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The clients of the rounds after `done`: `[m]` ids in increasing order, and their rows `[m, n]` of the pool.

        words: of the run's key.
        """
        drawn = _cohorts(layout, len(self._count), words, np.arange(done, done + self.rounds, dtype=np.int32))
        ids, first = np.unique(np.asarray(drawn)[:number], return_index=True)
        known = ids < len(self._count)  # what pads a cohort is nobody
        ids, first = ids[known], first[known]
        if isinstance(self._index, Sampled):
            rows = self._rows(drawn)  # of one shape, whatever the number
            return ids, rows.reshape(-1, rows.shape[-1])[first]
        return ids, self._rows(ids)

    def _rows(self, ids: Any) -> np.ndarray:
        """`[..., n]` rows of the pool of the clients `[...]`."""
        if isinstance(self._index, Sampled):
            drawn = dataclasses.replace(self._index, by_label=np.zeros(0, np.int32))
            return np.asarray(self._index.by_label)[np.asarray(_places(drawn, ids))]
        return self._index[ids]

    def _part(self, ids: np.ndarray, rows: np.ndarray, everywhere: Sharding) -> tuple[dict[str, Array], Array, Array]:
        """The rows of these clients, on the device: the part of the pool, and `ids` and `rows` of `CohortRows`."""
        needed, places = np.unique(rows, return_inverse=True)
        missing = (0, self.clients - len(ids))
        ids = np.pad(ids, missing, constant_values=len(self._count)).astype(np.int32)
        places = np.pad(places.reshape(rows.shape), (missing, (0, 0))).astype(np.int32)
        return hosts.place((taken(self.pool, needed, self.examples), ids, places), everywhere)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cohorts(layout: Layout, num_clients: int, words: Array, numbers: Array) -> Array:
    """`[rounds, C]` ids of the cohorts of the rounds `[rounds]` of a run whose key has these words, see `choose`."""
    key = jax.random.wrap_key_data(words)
    return lax.map(lambda number: sample(layout, num_clients, round_keys(key, number))[0], numbers)


@jax.jit
def _places(drawn: Sampled, ids: Array) -> Array:
    return drawn.places(ids)
