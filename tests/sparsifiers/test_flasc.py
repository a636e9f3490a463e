"""FLASC's download, against NumPy's sort, and what it leaves of the server's adapters."""

import math

import jax
import numpy as np
import pytest

from fedjax_lora.sparsifiers import flasc, top_k
from oracles.sparsifier_oracle import MAX_RANK, common_bits, random_adapters, scope
from toy import simulation

START = random_adapters(0)


def entries(adapters, factors="ab"):
    """(name, factor) -> values."""
    return {(name, side): np.asarray(getattr(f, side)) for name, f in adapters.modules.items() for side in factors}


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_download_is_the_largest_values(factors):
    """NumPy's sort over all R ranks; a client is charged for those in its own, and a frozen factor stays whole."""
    method = flasc.make(flasc.FlascConfig(download_ratio=0.25), START)
    ranks = (2, 6)
    shared, masks = scope(ranks[0], factors), np.stack([scope(rank, factors).ranks for rank in ranks])
    broadcast = jax.vmap(lambda mask: method.broadcast(START, shared.replace(ranks=mask)), out_axes=(None, 0))
    sparse, bits = jax.jit(broadcast)(masks)
    values = entries(START, factors)
    ordered = np.sort(np.concatenate([np.abs(x).ravel() for x in values.values()]))[::-1]
    threshold = ordered[len(ordered) // 4 - 1]
    found = entries(sparse)
    counts = [0, 0]
    for place, whole in entries(START).items():
        expected = np.where(np.abs(whole) >= threshold, whole, 0.0) if place[1] in factors else whole
        np.testing.assert_array_equal(found[place], expected)
        if place[1] in factors:
            columns = np.moveaxis(expected, 2 if place[1] == "a" else 1, -1)
            counts = [n + np.count_nonzero(columns[..., :rank]) for n, rank in zip(counts, ranks, strict=True)]
    assert counts[1] == len(ordered) // 4
    pools = [len(ordered) * rank // MAX_RANK for rank in ranks]
    for client, (count, pool) in enumerate(zip(counts, pools, strict=True)):
        index = min(pool, count * math.ceil(math.log2(pool)))
        assert bits[client] == common_bits(factors=factors) + 32 * count + index
    jax.tree.map(np.testing.assert_array_equal, sparse.head, START.head)


def test_upload_is_that_of_top_k():
    """Invariance: the same functions of the same broadcast."""
    ours, theirs = flasc.make(flasc.FlascConfig(), START), top_k.make(top_k.TopKConfig(), START)
    trained, key = random_adapters(1), jax.random.key(0)
    found, expected = (jax.jit(m.compress)(START, trained, (), np.float32(0.5), scope(), key) for m in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_was_not_downloaded_stays_at_the_server():
    """Closed form: with a learning rate of zero nothing moves, though the clients start from a sparse broadcast."""
    sim = simulation("sparsifier.name=flasc", "sparsifier.download_ratio=0.1", "lora.targets=[query]", "rounds=1")
    state = sim.init(jax.random.key(0))
    state = state.replace(hyper=state.hyper.replace(learning_rate=jax.numpy.float32(0.0)))
    before = jax.tree.map(np.asarray, state.adapters)
    after, _ = sim.run(state, 1)
    jax.tree.map(np.testing.assert_array_equal, after.adapters, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"download_ratio": 0.0}, "download_ratio must be above 0 and at most 1, got 0.0"),
        ({"download_ratio": 1.5}, "download_ratio must be above 0 and at most 1, got 1.5"),
        ({"name": "flask"}, "name must be 'flasc', got 'flask'"),
    ],
)
def test_config_names_field_and_value(options, message):
    """The message itself."""
    with pytest.raises(ValueError) as error:
        flasc.FlascConfig(**options)
    assert str(error.value) == message
