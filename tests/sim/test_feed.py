"""A training pool on the host: the same bits as on the device, of which a part alone is there."""

import jax
import numpy as np
import pytest

import toy

POPULATION = ("clients.partition={kind: sampled, examples: 6}", "clients.count=50", "clients.per_round=3")
CASES = {
    "drawn": POPULATION,
    "listed": ("clients.per_round=3", "engine.client_chunk=2"),
}


def same(found, expected) -> None:
    """Bit for bit, NaN where the other is."""

    def words(leaf):
        return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(words(x), words(y)), found, expected)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_a_pool_on_the_device(case):
    sims = [toy.simulation(*CASES[case], f"engine.data={place}") for place in ("host", "device")]
    state = sims[0].init(jax.random.key(3))
    (found, rows), (expected, told) = (sim.run(state, 6) for sim in sims)
    same((found, rows), (expected, told))
