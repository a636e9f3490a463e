"""Clients whose examples are drawn from their ids: a population of any size, without a table of who holds what."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

_PURPOSE = 2**32 - 1
"""Tells the keys of the population from those of a run with the same seed."""


@struct.dataclass
class Sampled:
    """The rows of every client, as a function of its id: indexed like a table `[K, n]`, of which nothing is stored.

    A client first draws shares of the labels from a Dirichlet, whose mean is the shares of the pool (Hsu, Qi & Brown,
    arXiv 1909.06335), then the label of each example from these, then a row of that label, with replacement.

    Example:
      >>> clients = sampled(np.array([0, 0, 1, 1, 1]), examples=4, alpha=0.5, seed=0)
      >>> clients[jnp.array([7, 999_999])].shape
      (2, 4)

    seed: uint32, of all draws.
    concentration: `[labels]` float32, of the Dirichlet, for each label of the pool.
    by_label: `[N]` int32 rows of the pool in the order of their labels.
    first, size: `[labels]` int32, where the rows of a label begin there, and how many they are.
    examples: n; static.
    """

    seed: Array | np.uint32
    concentration: Array | np.ndarray
    by_label: Array | np.ndarray
    first: Array | np.ndarray
    size: Array | np.ndarray
    examples: int = struct.field(pytree_node=False)

    def __getitem__(self, ids: ArrayLike) -> Array:
        """`[..., n]` int32 rows of the clients `ids` `[...]`."""
        return jnp.asarray(self.by_label)[self.places(ids)]

    def places(self, ids: ArrayLike) -> Array:
        """`[..., n]` int32, where in `by_label` the rows of the clients `ids` `[...]` stand; it is not read itself."""
        ids = jnp.asarray(ids)
        key = jax.random.fold_in(jax.random.key(self.seed), jnp.uint32(_PURPOSE))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids.ravel())
        return jax.vmap(self._of_client)(keys).reshape(*ids.shape, self.examples)

    def _of_client(self, key: Array) -> Array:
        skew_key, label_key, row_key = jax.random.split(key, 3)
        share = jax.random.loggamma(skew_key, self.concentration)  # up to a common factor
        label = jax.random.categorical(label_key, share, shape=(self.examples,))
        place = jax.random.randint(row_key, (self.examples,), 0, jnp.asarray(self.size)[label])
        return jnp.asarray(self.first)[label] + place

    def hash(self, num_clients: int) -> str:
        """SHA-256 of all that decides about the rows of so many clients."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self)]
        text = repr((num_clients, self.examples)).encode()
        return hashlib.sha256(text + b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def sampled(labels: np.ndarray, *, examples: int, alpha: float, seed: int) -> Sampled:
    """Clients of a pool with these labels, on the host.

    Args:
      labels: `[N]` integers.
      examples: that each client holds, n.
      alpha: concentration of the Dirichlet for a label of mean share, as in `partition`: large is near iid.
      seed: from 0 to 2**32 - 1.
    """
    _, label, size = np.unique(labels, return_inverse=True, return_counts=True)
    return Sampled(
        seed=np.uint32(seed),
        concentration=np.asarray(alpha * len(size) * size / len(labels), np.float32),
        by_label=np.argsort(label, kind="stable").astype(np.int32),
        first=(np.cumsum(size) - size).astype(np.int32),
        size=size.astype(np.int32),
        examples=examples,
    )
