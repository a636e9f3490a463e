"""Bits on the air against a count value by value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import lora as adapters
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.models.bert import BertConfig, bert
from fedjax_lora.sparsifiers import dense, payload, soft, soft_rotated
from oracles.sparsifier_oracle import (
    LAYERS,
    MAX_RANK,
    WIDTHS,
    payload_bits,
    random_adapters,
    scope,
    trained_from,
)

START = random_adapters(0)


@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("budget", ["module", "global"])
def test_soft_equals_count_of_what_was_sent(budget, rank):
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    method = soft.make(soft.SoftConfig(budget=budget), START)
    compress = jax.jit(method.compress)
    for kept in range(1, rank + 1):
        ratio = jnp.float32(kept / rank)
        sent, _ = compress(START, trained, (), ratio, used, jax.random.key(0))
        counts = {name: np.asarray(m).sum(-1).astype(int).tolist() for name, m in sent.counted.items()}
        assert sent.bits.dtype == jnp.uint32
        assert sent.bits == payload_bits(counts, index=True, known=budget == "module")
        planned = method.payload_bits(ratio, used)
        assert planned == sent.bits if budget == "module" else planned >= sent.bits


def test_global_plan_is_the_dearest_choice():
    """Brute force: the most that any split of the components over the matrices can cost, and a bitmap for each."""
    method, used = soft.make(soft.SoftConfig(budget="global"), START), scope(4)
    kept = 2
    total, wide, narrow = kept * LAYERS * len(WIDTHS), sum(WIDTHS["query"]), sum(WIDTHS["value"])
    values = max(
        q * wide + (total - q) * narrow for q in range(total + 1) if q <= 4 * LAYERS and total - q <= 4 * LAYERS
    )
    index = LAYERS * len(WIDTHS) * MAX_RANK
    head = payload_bits({}, index=False)
    assert method.payload_bits(jnp.float32(0.5), used) == head + 32 * values + index


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_rotated_equals_count_with_rotations(rank):
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    method = soft_rotated.make(soft_rotated.SoftRotatedConfig(), START)
    compress = jax.jit(method.compress)
    for kept in range(1, rank + 1):
        ratio = jnp.float32(kept / rank)
        sent, _ = compress(START, trained, (), ratio, used, jax.random.key(0))
        counts = {name: [kept] * LAYERS for name in WIDTHS}
        assert sent.bits == payload_bits(counts, index=False, extra=rank)
        assert method.payload_bits(ratio, used) == sent.bits


def test_dense_equals_count_at_every_ratio():
    used = scope(4)
    method = dense.make(dense.DenseConfig(), START)
    expected = payload_bits({name: [4] * LAYERS for name in WIDTHS}, index=False)
    np.testing.assert_array_equal(method.payload_bits(jnp.array([0.1, 1.0]), used), [expected, expected])
    assert (
        dense.make(dense.DenseConfig(), START).compress(START, START, (), 0.1, used, jax.random.key(0))[0].bits
        == expected
    )


@pytest.mark.parametrize(
    ("max_rank", "kept", "expected"),
    [(1, 1, 0), (2, 1, 1), (8, 1, 3), (8, 3, 8), (16, 3, 12), (9, 2, 8), (8, 0, 0)],
)
def test_index_equals_closed_form(max_rank, kept, expected):
    """min(R, k ceil(log2 R))."""
    assert payload.index_bits(jnp.uint32(kept), max_rank) == expected


def test_shapes_are_enough():
    """Invariance: a method made from shapes counts the same bits."""
    shapes = jax.eval_shape(lambda: START)
    ratio, used = jnp.float32(0.5), scope(4)
    for module, config in ((soft, soft.SoftConfig()), (dense, dense.DenseConfig())):
        assert module.make(config, shapes).payload_bits(ratio, used) == module.make(config, START).payload_bits(
            ratio, used
        )


def test_a_payload_beyond_uint32_is_refused():
    """Closed form: 2^27 values of 32 bits are 2^32 bits."""
    like = jax.eval_shape(lambda: Adapters({"w": Factors(jnp.zeros((64, 2**17, 8)), jnp.zeros((64, 8, 2**17)))}, {}))
    with pytest.raises(ValueError, match=r"payload of one client must be below 2\*\*32 bits, got 4294967"):
        dense.make(dense.DenseConfig(), like)


def test_modules_of_unequal_rank_are_refused():
    """The message itself."""
    like = Adapters({"w": Factors(jnp.zeros((1, 3, 2)), jnp.zeros((1, 4, 5)))}, {})
    with pytest.raises(ValueError, match=r"modules must have one common maximum rank, got \[2, 4\]"):
        dense.make(dense.DenseConfig(), like)
    with pytest.raises(ValueError, match="name must be 'dense', got 'all'"):
        dense.DenseConfig(name="all")  # pyright: ignore[reportArgumentType]


def test_encoder_of_roberta_base_equals_published_count():
    """Closed form: 12 layers x 8 x (4 x (768 + 768) + 2 x (768 + 3072)); and over 30 clients and 50 rounds."""
    encoder = bert(BertConfig(vocab_size=50265, width=768, num_layers=12, num_heads=12, mlp_width=3072), num_classes=2)
    like = jax.eval_shape(lambda key: Adapters(adapters.init(key, encoder.targets, 12, 8), {}), jax.random.key(0))
    assert sorted(like.modules) == ["down", "key", "output", "query", "up", "value"]
    values = int(payload.dense_bits(like, Scope.whole(jnp.ones(8)))) // 32
    assert values == 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) == 1_327_104
    assert values * 30 * 50 == 1_990_656_000
