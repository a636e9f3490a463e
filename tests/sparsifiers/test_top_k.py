"""Choosing single values, against NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.sparsifiers import top_k
from oracles.contexts import context, upload
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    RANK,
    WIDTHS,
    element_bits,
    product,
    random_adapters,
    scope,
    trained_from,
)

KEY = jax.random.key(0)
START = random_adapters(0)
TRAINED = trained_from(START, 1)
METHOD = top_k.make(top_k.TopKConfig(), context(START))
UPLOAD = jax.jit(upload(METHOD))


def send(ratio, trained=TRAINED, used=None):
    return UPLOAD(START, trained, (), jnp.float32(ratio * RANK), used or scope(), KEY)


def changes(trained):
    """All changes of the ranks in use, as (magnitude, where) pairs."""
    found = []
    for name, f in trained.modules.items():
        for side, before in (("a", START.modules[name].a), ("b", START.modules[name].b)):
            after = np.asarray(getattr(f, side))
            for where in np.ndindex(after.shape):
                if where[2 if side == "a" else 1] < RANK:
                    found.append((abs(after[where] - np.asarray(before)[where]), (name, side, *where)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("ratio", [1e-6, 0.125, 0.5, 1.0])
def test_the_largest_changes_of_the_whole_adapter_are_sent(ratio):
    """NumPy's sort of every change; the others stay as broadcast."""
    sent, ordered = send(ratio), changes(TRAINED)
    count = max(1, int(ratio * len(ordered)))
    chosen = {where for _, where in ordered[:count]}
    for name, f in sent.adapters.modules.items():
        for side in ("a", "b"):
            found = np.asarray(getattr(f, side))
            for where in np.ndindex(found.shape):
                is_sent = (name, side, *where) in chosen
                expected = np.asarray(getattr((TRAINED if is_sent else START).modules[name], side))[where]
                assert abs(found[where] - expected) <= (1e-6 if is_sent else 0.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), sent.adapters.head, TRAINED.head)
    assert sent.bits.exact() == element_bits(ratio)
    np.testing.assert_allclose(sent.kept_ranks, RANK * count / len(ordered), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 500, 1000])
def test_largest_equals_stable_sort(count):
    """NumPy's stable sort, over many magnitudes with ties, zeros and subnormal numbers; the first of equals wins."""
    generator = np.random.default_rng(count)
    x = np.float32(generator.lognormal(0, 20, 1000))
    x[generator.integers(0, 1000, 300)] = generator.choice(np.float32([0.0, 1e-42, 1.0, 3.5]), 300)
    expected = np.zeros(1000, bool)
    expected[np.argsort(-x.astype(np.float64), kind="stable")[:count]] = True
    np.testing.assert_array_equal(jax.jit(top_k.largest)(jnp.asarray(x), jnp.uint32(count)), expected)


def test_ties_do_not_send_more_than_is_charged():
    """Closed form: changes of one magnitude everywhere, as after one step of Adam; exactly k of them arrive."""
    modules = {
        name: Factors(
            a=jnp.where(jnp.arange(MAX_RANK) < RANK, f.a + 0.5, f.a),
            b=jnp.where(jnp.arange(MAX_RANK)[:, None] < RANK, f.b - 0.5, f.b),
        )
        for name, f in jax.tree.map(jnp.zeros_like, START).modules.items()
    }
    zero = jax.tree.map(jnp.zeros_like, START)
    sent = UPLOAD(zero, Adapters(modules, zero.head), (), jnp.float32(RANK / 4), scope(), KEY)
    pool = sum(LAYERS * RANK * (n_in + n_out) for n_in, n_out in WIDTHS.values())
    assert sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(sent.adapters)) == pool // 4


def test_tail_energy_equals_sorted_squares():
    """NumPy: the squares beyond the first k values for each component of a matrix."""
    tails = METHOD.offer(START, TRAINED, scope()).tail_energy
    squares = np.array([magnitude for magnitude, _ in changes(TRAINED)], np.float64) ** 2
    expected = [squares[min(k, RANK) * len(squares) // RANK :].sum() for k in range(MAX_RANK + 1)]
    np.testing.assert_allclose(tails, expected, rtol=1e-5)


def test_dropped_energy_equals_explicit_products():
    """Of what was sent, product by product."""
    sent = send(0.25)
    expected = sum(
        np.sum((product(f, layer, range(RANK)) - product(sent.adapters.modules[name], layer, range(RANK))) ** 2)
        for name, f in TRAINED.modules.items()
        for layer in range(LAYERS)
    )
    np.testing.assert_allclose(sent.dropped_energy, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "pool", "expected"),
    [(0.0, 100, 1), (1.0, 100, 100), (0.25, 100, 25), (0.259, 100, 25), (1.0, 2**26 + 1, 2**26 + 1), (0.5, 0, 0)],
)
def test_number_kept_equals_closed_form(ratio, pool, expected):
    """max(1, floor(ratio * pool)), all of a pool beyond float32's integers, none of an empty one."""
    assert top_k.num_kept(jnp.float32(ratio), jnp.uint32(pool)) == expected


def test_whole_ranks_are_counted_exactly():
    """Python integers: k of r ranks are k parts of the pool; a fraction is rounded down, and beyond r is all."""
    count = jax.jit(top_k.num_kept)
    for rank in (1, 3, 6, 7, 49):
        pool = jnp.uint32(1_000_003 * rank)
        for k in range(1, rank + 2):
            assert count(jnp.float32(k), pool, jnp.float32(rank)) == min(k, rank) * 1_000_003
        assert count(jnp.float32(0.5), pool, jnp.float32(rank)) == 500_001


def test_only_the_head_in_scope():
    """Closed form: no value, no position."""
    used = scope(factors="")
    sent = send(0.5, used.select(TRAINED, START), used)
    jax.tree.map(np.testing.assert_array_equal, sent.adapters.modules, START.modules)
    assert sent.bits.exact() == 32 * sum(leaf.size for leaf in jax.tree.leaves(START.head))
    assert sent.kept_ranks == 0


def test_config_names_field_and_value():
    """The message itself."""
    with pytest.raises(ValueError, match="name must be 'top_k', got 'topk'"):
        top_k.TopKConfig(name="topk")  # pyright: ignore[reportArgumentType]
