"""Random keys, named by purpose and keyed by identity.

A client's key is `fold_in(purpose_key, client_id)`, never a position in a list, so that a result does not
change with the order of the cohort, its padding, the size of a chunk or the number of devices.
"""

from typing import NamedTuple

import jax
from jax import Array


class RoundKeys(NamedTuple):
    """The keys of one round, one for each purpose."""

    channel: Array
    cohort: Array
    local: Array
    sparsify: Array
    aggregate: Array


def round_keys(key: Array, round_number: Array) -> RoundKeys:
    """Keys of round `round_number` of the run that was seeded with `key`."""
    parts = jax.random.split(jax.random.fold_in(key, round_number), len(RoundKeys._fields))
    return RoundKeys(*parts)


def client_keys(key: Array, client_ids: Array) -> Array:
    """`[C]` keys, one for each of the `[C]` client identities."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, client_ids)
