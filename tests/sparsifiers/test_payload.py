"""Bits on the air against a count value by value."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.adapters import lora
from fedjax_lora.core.count import Count
from fedjax_lora.core.exchange import Message, Size, Transform
from fedjax_lora.core.types import Adapters, Factors, Scope
from fedjax_lora.models import bert, table
from fedjax_lora.sparsifiers import dense, payload, ranks, soft, soft_rotated, top_k
from fedjax_lora.sparsifiers.transforms import WireConfig, chain
from oracles.contexts import context, offered_bits, upload
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
    method = soft.make(soft.SoftConfig(budget=budget), context(START))
    send, offered = jax.jit(upload(method)), offered_bits(method, START, trained, used)
    for kept in range(1, rank + 1):
        sent = send(START, trained, (), jnp.float32(kept), used, jax.random.key(0))
        counts = {name: np.asarray(m).sum(-1).astype(int).tolist() for name, m in sent.counted.items()}
        assert sent.bits.exact() == payload_bits(counts, index=True, known=budget == "module")
        assert offered[kept] == sent.bits.exact() if budget == "module" else offered[kept] >= sent.bits.exact()


def test_global_plan_is_the_dearest_choice():
    """Brute force: the most that any split of the components over the matrices can cost, and a bitmap for each."""
    kept, used = 2, scope(4)
    method = soft.make(soft.SoftConfig(budget="global"), context(START))
    total, wide, narrow = kept * LAYERS * len(WIDTHS), sum(WIDTHS["query"]), sum(WIDTHS["value"])
    values = max(
        q * wide + (total - q) * narrow for q in range(total + 1) if q <= 4 * LAYERS and total - q <= 4 * LAYERS
    )
    index = LAYERS * len(WIDTHS) * MAX_RANK
    head = payload_bits({}, index=False)
    assert offered_bits(method, START, START, used)[kept] == head + 32 * values + index


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_rotated_equals_count_with_rotations(rank):
    used, trained = scope(rank), trained_from(START, 1, rank=rank)
    method = soft_rotated.make(soft_rotated.SoftRotatedConfig(), context(START))
    send, offered = jax.jit(upload(method)), offered_bits(method, START, trained, used)
    for kept in range(1, rank + 1):
        sent = send(START, trained, (), jnp.float32(kept), used, jax.random.key(0))
        counts = {name: [kept] * LAYERS for name in WIDTHS}
        assert sent.bits.exact() == payload_bits(counts, index=False, extra=rank)
        assert offered[kept] == sent.bits.exact()


def test_dense_equals_count_at_every_ratio():
    used, method = scope(4), dense.make(dense.DenseConfig(), context(START))
    expected = payload_bits({name: [4] * LAYERS for name in WIDTHS}, index=False)
    np.testing.assert_array_equal(offered_bits(method, START, START, used), [expected] * (MAX_RANK + 1))
    assert upload(method)(START, START, (), 0.4, used, jax.random.key(0)).bits.exact() == expected


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
    for module, config in ((soft, soft.SoftConfig()), (dense, dense.DenseConfig())):
        counts = [offered_bits(module.make(config, context(like)), START, START, scope(4)) for like in (shapes, START)]
        np.testing.assert_array_equal(*counts)


def test_bits_are_made_of_the_last_width_and_every_scale():
    """Closed form: values at the last width that a transform gives, scales of all of them, exact numbers in full."""
    size = Size(*(Count.of(n) for n in (10, 3, 5, 7)))
    none = Transform(apply=lambda tensors, key: tensors)
    assert payload.bits(size).exact() == 10 * 32 + 5 * 32 + 7
    assert payload.bits(size, [none]).exact() == 10 * 32 + 5 * 32 + 7
    chain = [none._replace(bits_per_value=8, bits_per_tensor=32), none, none._replace(bits_per_value=4), none]
    assert payload.bits(size, chain).exact() == 10 * 4 + 3 * 32 + 5 * 32 + 7


def test_masks_are_counted_value_by_value():
    """NumPy: masks broadcast to their tensors; a matrix counts where any of it is sent, as a vector or scalar does."""
    generator = np.random.default_rng(0)
    tensors = {
        "rows": jnp.zeros((3, 4, 5)),
        "columns": jnp.zeros((3, 4, 5)),
        "each": jnp.zeros((2, 3, 4)),
        "stack": jnp.zeros((6, 2, 2)),
        "vector": jnp.zeros(7),
        "scalar": jnp.zeros(()),
        "none": jnp.zeros((4, 4)),
    }
    shapes = {
        "rows": (3, 4, 1),
        "columns": (5,),
        "each": (2, 3, 4),
        "stack": (),
        "vector": (7,),
        "scalar": (),
        "none": (),
    }
    sent = {name: generator.integers(0, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    sent |= {"stack": np.float32(1), "scalar": np.float32(1), "none": np.float32(0)}
    sent["rows"][1] = 0
    values = matrices = 0
    for name, tensor in tensors.items():
        whole = np.broadcast_to(sent[name], tensor.shape)
        values += np.count_nonzero(whole)
        matrices += np.count_nonzero(whole.reshape(*tensor.shape[: max(tensor.ndim - 2, 0)], -1).any(-1))
    message = Message(
        tensors,
        jax.tree.map(jnp.asarray, sent),
        index_bits=Count.of(11),
        kept_ranks=jnp.zeros(()),
        dropped_energy=jnp.zeros(()),
        exact={"x": jnp.zeros((2, 3, 3))},
        exact_sent={"x": jnp.asarray([[1.0], [0.0], [1.0]])},
    )
    found = [count.exact().item() for count in jax.jit(payload.message_size)(message)]
    assert found == [values, matrices, 12, 11]


class Llama7B:
    """LoRA of rank 64 on every linear layer of a 7B model: shapes alone, nothing is allocated."""

    RANK, LAYERS, WIDTH, MLP = 64, 32, 4096, 11008
    SHAPES: ClassVar = {
        **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
        **dict.fromkeys(("gate", "up"), (WIDTH, MLP)),
        "down": (MLP, WIDTH),
    }

    @classmethod
    def adapters(cls):
        def factor(*shape):
            return jax.ShapeDtypeStruct((cls.LAYERS, *shape), jnp.float32)

        modules = {
            n: Factors(factor(n_in, cls.RANK), factor(cls.RANK, n_out)) for n, (n_in, n_out) in cls.SHAPES.items()
        }
        return Adapters(modules=modules, head={})

    @classmethod
    def values(cls, kept):
        """Python integers: of as many components of every matrix."""
        return sum(cls.LAYERS * kept * (n_in + n_out) for n_in, n_out in cls.SHAPES.values())


def test_a_payload_beyond_32_bits_is_exact():
    """Python integers: 5.1 Gbit of a dense upload, and what soft, top_k and svd offer of it, at 32 and at 8 bits."""
    model, like, used = Llama7B, Llama7B.adapters(), Scope.whole(jnp.ones(Llama7B.RANK))
    matrices, ranks_kept = model.LAYERS * len(model.SHAPES), jnp.uint32([16, 64])
    sizes = jax.jit(
        lambda scope: {
            "dense": payload.dense_size(like, scope),
            "module": ranks.planned_size(ranks_kept, "module", like, scope),
            "global": ranks.planned_size(ranks_kept, "global", like, scope),
            "values": payload.value_size(
                like,
                jnp.uint32(model.values(64)),
                scope,
                top_k.index_bits(jnp.uint32(model.values(64)), top_k.pool_size(like, scope)),
            ),
        }
    )(used)
    assert 32 * model.values(64) == 5_117_050_880 > 2**32
    assert payload.bits(sizes["dense"]).exact() == 32 * model.values(64)
    assert payload.bits(sizes["dense"], chain(WireConfig(bits=8))).exact() == 8 * model.values(64) + 32 * 2 * matrices
    expected = [32 * model.values(k) + matrices * min(64, 6 * k) for k in (16, 64)]
    np.testing.assert_array_equal(payload.bits(sizes["module"]).exact(), expected)
    left, dearest = 16 * matrices, 0
    for n_in, n_out in sorted(model.SHAPES.values(), key=sum, reverse=True):
        taken = min(left, 64 * model.LAYERS)
        dearest, left = dearest + taken * (n_in + n_out), left - taken
    expected = [32 * dearest + 64 * matrices, 32 * model.values(64) + 64 * matrices]
    np.testing.assert_array_equal(payload.bits(sizes["global"]).exact(), expected)
    assert payload.bits(sizes["values"]).exact() == 33 * model.values(64)  # a bitmap beside the values


def test_a_message_beyond_32_bits_is_counted_from_its_masks():
    """Python integers, of tensors that are shapes and masks as small as those that are sent."""
    model, like = Llama7B, Llama7B.adapters()
    used = Scope.whole(jnp.ones(model.RANK))
    kept = ranks.everywhere(jnp.where(jnp.arange(model.RANK) < 48, 1.0, 0.0), like)
    sent = ranks.sent_masks(like, kept, kept, used)
    size = payload.message_size(Message(like, sent, Count.of(0), jnp.zeros(()), jnp.zeros(())))
    assert size.values.exact() == model.values(48)
    assert size.tensors.exact() == 2 * model.LAYERS * len(model.SHAPES)
    wide = Message({"x": jax.ShapeDtypeStruct((2**20, 2**14), jnp.float32)}, {"x": jnp.ones(())}, *[Count.of(0)] * 3)
    assert payload.message_size(wide).values.exact() == 2**34


def test_values_beyond_32_bits_cannot_be_chosen_from():
    """The message itself: single values are numbered in 32 bits."""
    like = jax.eval_shape(lambda: Adapters({"w": Factors(jnp.zeros((64, 2**22, 8)), jnp.zeros((64, 8, 2**22)))}, {}))
    with pytest.raises(ValueError, match=r"factors must hold fewer than 2\*\*32 values, got 4294967296"):
        top_k.make(top_k.TopKConfig(), context(like))


def test_modules_of_unequal_rank_are_refused():
    """The message itself."""
    like = Adapters({"w": Factors(jnp.zeros((1, 3, 2)), jnp.zeros((1, 4, 5)))}, {})
    with pytest.raises(ValueError, match=r"modules must have one common maximum rank, got \[2, 4\]"):
        dense.make(dense.DenseConfig(), context(like))
    with pytest.raises(ValueError, match="a sparsifier must be made for adapters, got a context with like None"):
        dense.make(dense.DenseConfig(), context())
    with pytest.raises(ValueError, match="name must be 'dense', got 'all'"):
        dense.DenseConfig(name="all")  # pyright: ignore[reportArgumentType]


def test_encoder_of_roberta_base_equals_published_count():
    """Closed form: 12 layers x 8 x (4 x (768 + 768) + 2 x (768 + 3072)); and over 30 clients and 50 rounds."""
    encoder = bert.BertConfig(vocab_size=50265, width=768, num_layers=12, num_heads=12, mlp_width=3072)
    sites = table.sites(bert.weights(encoder))
    like = jax.eval_shape(lambda key: Adapters(lora.init(key, sites, 12, 8), {}), jax.random.key(0))
    assert sorted(like.modules) == ["down", "key", "output", "query", "up", "value"]
    values = payload.dense_size(like, Scope.whole(jnp.ones(8))).values.exact()
    assert values == 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) == 1_327_104
    assert values * 30 * 50 == 1_990_656_000
