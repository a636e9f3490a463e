"""FLASC's download, against NumPy's sort, and what it leaves of the server's adapters."""

import math

import jax
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.sparsifiers import flasc, payload, top_k
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import common_bits, random_adapters, rank_mask, scope
from toy import simulation

START = random_adapters(0)


def entries(adapters, factors="ab"):
    """(name, factor) -> values."""
    return {(name, side): np.asarray(getattr(f, side)) for name, f in adapters.modules.items() for side in factors}


def in_use(values, side, rank):
    """The first `rank` components of a factor."""
    return values[..., :rank] if side == "a" else values[:, :rank]


@pytest.mark.parametrize("factors", ["ab", "a", "b"])
def test_download_is_the_largest_values(factors):
    """NumPy's sort over the structural rank; a client is charged for its own ranks, and a frozen factor stays whole."""
    method = flasc.make(flasc.FlascConfig(download_ratio=0.25), context(START))
    ranks, used = (2, 4), 4
    masks = np.stack([rank_mask(rank) for rank in ranks])
    broadcast = jax.vmap(lambda mask: method.broadcast(START, scope(used, factors), mask), out_axes=(None, 0))
    sparse, size = jax.jit(broadcast)(masks)
    bits = payload.bits(size).exact()
    values = {place: in_use(x, place[1], used) for place, x in entries(START, factors).items()}
    ordered = np.sort(np.concatenate([np.abs(x).ravel() for x in values.values()]))[::-1]
    threshold = ordered[len(ordered) // 4 - 1]
    found = entries(sparse)
    counts = [0, 0]
    for place, whole in entries(START).items():
        if place[1] in factors:
            chosen, side = np.where(np.abs(whole) >= threshold, whole, 0.0), place[1]
            np.testing.assert_array_equal(in_use(found[place], side, used), in_use(chosen, side, used))
            counts = [n + np.count_nonzero(in_use(chosen, side, r)) for n, r in zip(counts, ranks, strict=True)]
        else:
            np.testing.assert_array_equal(found[place], whole)
    assert counts[1] == len(ordered) // 4
    pools = [len(ordered) * rank // used for rank in ranks]
    for client, (count, pool) in enumerate(zip(counts, pools, strict=True)):
        index = min(pool, count * math.ceil(math.log2(pool)))
        assert bits[client] == common_bits(factors=factors) + 32 * count + index
    jax.tree.map(np.testing.assert_array_equal, sparse.head, START.head)


def test_rank_is_a_mask_of_the_download():
    """Invariance: rank 4 of R = 6 is sent the values, the bits and the share of R = 4; only what is in use counts."""
    modules = {name: Factors(a=f.a[..., :4], b=f.b[:, :4]) for name, f in START.modules.items()}
    small = Adapters(modules=modules, head=START.head)
    config, mask = flasc.FlascConfig(download_ratio=0.3), jax.numpy.asarray(rank_mask(4))
    masked, masked_size = jax.jit(flasc.make(config, context(START)).broadcast)(START, scope(4), mask)
    exact, exact_size = jax.jit(flasc.make(config, context(small)).broadcast)(small, Scope.whole(mask[:4]), mask[:4])
    jax.tree.map(np.testing.assert_array_equal, masked_size, exact_size)
    pool = kept = 0
    for place, expected in entries(exact).items():
        np.testing.assert_array_equal(in_use(entries(masked)[place], place[1], 4), expected)
        pool, kept = pool + expected.size, kept + np.count_nonzero(expected)
    assert kept == math.floor(0.3 * pool)


def test_upload_is_that_of_top_k():
    """Invariance: the same functions of the same broadcast."""
    like = context(START)
    ours, theirs = flasc.make(flasc.FlascConfig(), like), top_k.make(top_k.TopKConfig(), like)
    trained, key = random_adapters(1), jax.random.key(0)
    found, expected = (jax.jit(upload(m))(START, trained, (), np.float32(2), scope(), key) for m in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_was_not_downloaded_stays_at_the_server():
    """Closed form: with a learning rate of zero nothing moves, though the clients start from a sparse broadcast."""
    sim = simulation("sparsifier.name=flasc", "sparsifier.download_ratio=0.1", "lora.targets=[query]", "rounds=1")
    state = sim.init(jax.random.key(0))
    state = state.replace(numbers={**state.numbers, "local.optimizer.learning_rate": jax.numpy.float32(0.0)})
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
