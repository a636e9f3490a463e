"""Packed batches: against a loop in NumPy, and a model on them against the same model on padded ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.types import Adapters, Factors, Packing
from fedjax_lora.data.packing import ATTENTION, MULTIPLE, deal, largest, pack, packed, packing_of
from fedjax_lora.models import bert
from oracles.model_context import model_context

PARTS = model_context(2).made
LENGTHS = {
    "one token each": [1, 1, 1, 1, 1, 1],
    "all of full length": [16, 16, 16, 16, 16, 16],
    "one of full length": [16, 1, 2, 1, 3, 1],
    "mixed": [5, 12, 1, 16, 7, 3],
    "places left over": [9, 4, 0, 0, 0, 0],
    "padded on the left": [-5, 12, -16, 3, -1, 7],
}
"""Negative ones are padded on the left."""

ALWAYS = [("places left over", "mean"), ("padded on the left", "cls")]
"""Of gradients; the others are slow."""


def batch_of(lengths, seed=0):
    """A batch of 16 positions whose examples of length 0 have a weight of 0; and its weight."""
    lengths, random = np.asarray(lengths), np.random.default_rng(seed)
    mask = np.arange(16) < np.maximum(np.abs(lengths), 1)[:, None]
    mask = np.where((lengths < 0)[:, None], mask[:, ::-1], mask)
    batch = {
        "input_ids": jnp.asarray(random.integers(1, 31, (len(lengths), 16)), jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
        "token_type_ids": jnp.asarray(random.integers(0, 2, (len(lengths), 16)), jnp.int32),
        "label": jnp.asarray(random.integers(0, 2, len(lengths)), jnp.int32),
    }
    return batch, jnp.asarray(lengths != 0, jnp.float32)


def encoder(**more):
    """A small BERT, its weights, and effective adapters of which none is zero."""
    shape = bert.BertConfig(vocab_size=31, width=24, num_layers=2, num_heads=3, mlp_width=40, max_positions=16, **more)
    model, random = bert.bert(shape, PARTS["task"], PARTS["adapter"]), np.random.default_rng(1)

    def normal(*size):
        return jnp.asarray(0.2 * random.normal(size=size), jnp.float32)

    modules = {
        name: Factors(a=normal(2, site.n_in, 4), b=normal(2, 4, site.n_out)) for name, site in model.sites.items()
    }
    return model, model.init(jax.random.key(3)), Adapters(modules=modules, head={"w": normal(24, 2), "b": normal(2)})


def all_packings(lengths):
    """Of one to three rows, just wide enough, and of two wider ones."""
    needed = {rows: int(np.max(deal(jnp.abs(jnp.asarray(lengths)), rows)[2])) for rows in (1, 2, 3)}
    return [*needed.items(), (2, needed[2] + 5)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_position_lies_in_one_place_and_examples_are_whole(lengths):
    batch, weight = batch_of(lengths)
    real = (np.asarray(batch["attention_mask"]) > 0) & (np.asarray(weight) > 0)[:, None]
    for rows, width in all_packings(lengths):
        found = {name: np.asarray(leaf) for name, leaf in pack(batch, jnp.asarray(real), rows, width).items()}
        np.testing.assert_array_equal(found["label"], batch["label"])
        assert found["attention_mask"].sum() == real.sum()
        for example, own in enumerate(real):
            here = (found["example_ids"] == example) & (found["attention_mask"] == 1)
            places = np.flatnonzero(here)
            assert len(places) == own.sum()
            if len(places):
                assert places[0] == found["first_places"][example]
                assert len(set(places // width)) == 1 and (np.diff(places) == 1).all()
            np.testing.assert_array_equal(found["position_ids"].ravel()[places], np.flatnonzero(own))
            np.testing.assert_array_equal(
                found["input_ids"].ravel()[places], np.asarray(batch["input_ids"])[example, own]
            )


def test_rows_are_dealt_the_longest_first_forth_and_back():
    row, start, taken = deal(jnp.array([4, 9, 1, 6, 2]), 2)
    # By hand: 9 | 6, then back: 2 and 4, then 1 goes to the first row again.
    np.testing.assert_array_equal(row, [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(start, [6, 0, 11, 0, 9])
    np.testing.assert_array_equal(taken, [12, 10])


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        pytest.param(name, pooling, marks=[] if (name, pooling) in ALWAYS else pytest.mark.slow)
        for name in LENGTHS
        for pooling in ("mean", "cls")
    ],
)
def test_loss_and_gradient_are_those_of_the_padded_batch(name, pooling):
    lengths = LENGTHS[name]
    model, base, adapters = encoder(pooling=pooling, dropout=0.2)
    batch, weight = batch_of(lengths)
    real = (batch["attention_mask"] > 0) & (weight > 0)[:, None]

    def loss(adapters: Adapters, batch):
        logits = model.apply(base, adapters, batch, jax.random.key(7))
        return PARTS["task"].loss(logits, batch, weight)

    expected = jax.jit(jax.value_and_grad(loss))(adapters, batch)
    for rows, width in all_packings(lengths):
        found = jax.jit(jax.value_and_grad(loss))(adapters, pack(batch, real, rows, width))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), found, expected)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_least_width_that_holds_a_batch_is_taken(lengths):
    batch, weight = batch_of(lengths)
    widths = (8, 16, 32)
    rows = jax.jit(lambda: packed(Packing(2, widths), batch, weight, lambda b: jnp.size(b["input_ids"])))()
    needed = int(np.max(deal(jnp.abs(jnp.asarray(lengths)), 2)[2]))
    assert rows == next((2 * width for width in widths if width >= needed), batch["input_ids"].size)


def test_only_the_example_that_is_not_finite_is_so():
    model, base, adapters = encoder()
    base["embeddings"]["word"] = base["embeddings"]["word"].at[0].set(jnp.nan)
    batch, weight = batch_of(LENGTHS["mixed"])
    batch["input_ids"] = batch["input_ids"].at[3, 5].set(0)  # in no other place
    finite = np.arange(6) != 3
    for packing in (None, Packing(2, (64,))):
        logits = packed(packing, batch, weight, lambda batch: model.apply(base, adapters, batch))
        np.testing.assert_array_equal(np.isfinite(logits).all(-1), finite)


def test_a_leaf_of_the_task_is_not_packed_whatever_its_shape():
    batch, _ = batch_of(LENGTHS["mixed"])
    targets = jnp.arange(6 * 16.0).reshape(6, 16)
    found = pack({**batch, "targets": targets}, batch["attention_mask"] > 0, 2, 30)
    np.testing.assert_array_equal(found["targets"], targets)


def test_a_batch_that_is_smaller_than_planned_is_not_blown_up():
    batch, weight = batch_of([3, 2])
    for packing, places in ((Packing(4, (8, 16)), 32), (Packing(2, (8, 32)), 16)):
        assert packed(packing, batch, weight, lambda b: jnp.size(b["input_ids"])) == places


def test_all_that_are_mapped_together_take_one_branch():
    """Trials by clients: the index has no batch axis, so the program holds a conditional, and no select of results."""
    batches = [[batch_of(LENGTHS[name], seed) for name in ("mixed", "one token each")] for seed in (0, 1)]
    batch, weight = jax.tree.map(lambda *x: jnp.stack(x), *[jax.tree.map(lambda *x: jnp.stack(x), *b) for b in batches])

    def work(batch):
        return jnp.sum(batch["input_ids"] * batch["attention_mask"])

    def one(batch, weight):
        return packed(Packing(2, (8, 24)), batch, weight, work), packed(
            Packing(2, (8, 24)), batch, weight, lambda b: jnp.float32(b["input_ids"].size)
        )

    both = jax.vmap(jax.vmap(one))
    found, sizes = jax.jit(both)(batch, weight)
    np.testing.assert_array_equal(found, (batch["input_ids"] * batch["attention_mask"]).sum((2, 3)))
    np.testing.assert_array_equal(sizes, np.full((2, 2), 2 * 24))  # the widest that one of the four needs
    conditionals = [e for e in jax.make_jaxpr(both)(batch, weight).eqns if e.primitive.name == "cond"]
    assert len(conditionals) == 2
    assert all(e.invars[0].aval.shape == () for e in conditionals)


def test_the_largest_of_what_is_mapped_has_no_axis():
    values = jnp.arange(6).reshape(2, 3)
    assert jax.vmap(jax.vmap(largest, out_axes=None), out_axes=None)(values) == 5
    assert largest(jnp.int32(4)) == 4


def sentences(mean, longest, count=500):
    """A mask of sentences whose length is Poisson."""
    lengths = np.clip(np.random.default_rng(1).poisson(mean, count), 1, longest)
    return (np.arange(longest) < lengths[:, None]).astype(np.int32)


def test_widths_hold_random_batches_with_little_to_spare():
    mask = sentences(23, 64)
    packing = packing_of(mask, 8)
    assert packing is not None and 1 < packing.rows < 8
    assert all(width % MULTIPLE == 0 for width in packing.widths)
    drawn = jnp.asarray(mask.sum(1)[np.random.default_rng(2).integers(0, 500, (2000, 8))])
    needed = np.asarray(jax.vmap(lambda lengths: jnp.max(deal(lengths, packing.rows)[2]))(drawn))
    assert np.mean(needed <= packing.widths[-1]) > 0.95
    places = [next((packing.rows * width for width in packing.widths if width >= n), 8 * 64) for n in needed]
    assert np.mean(places) < 1.15 * drawn.sum(1).mean() < 0.6 * 8 * 64


def test_widths_are_of_as_many_batches_as_are_computed_together():
    mask = sentences(23, 64)
    alone, together = packing_of(mask, 8), packing_of(mask, 8, together=64)
    assert alone is not None and together is not None
    drawn = jnp.asarray(mask.sum(1)[np.random.default_rng(2).integers(0, 500, (200, 64, 8))])
    needed = jax.vmap(jax.vmap(lambda lengths: jnp.max(deal(lengths, together.rows)[2])))(drawn).max(1)
    assert np.mean(needed <= together.widths[0]) > 0.02  # no width idles
    assert np.mean(needed <= together.widths[-1]) > 0.97
    assert together.rows * together.widths[0] > alone.rows * alone.widths[0]


def test_no_other_widths_are_expected_to_take_less():
    """Oracle: all choices of widths and of rows, for ten sentences in batches of two, by enumeration."""
    lengths = np.array([3, 5, 9, 12, 17, 20, 22, 30, 31, 40])
    packing = packing_of((np.arange(40) < lengths[:, None]).astype(np.int32), 2)
    pairs = np.sort(np.stack(np.meshgrid(lengths, lengths), -1).reshape(-1, 2), 1)

    def expected(rows, widths):
        needed = pairs.sum(1) if rows == 1 else pairs.max(1)
        places = [
            next((rows * w * (1 + w / ATTENTION) for w in widths if w >= n), 80 * (1 + 40 / ATTENTION)) for n in needed
        ]
        return np.mean(places)

    least = min(
        expected(rows, widths)
        for rows in (1, 2)
        for count in range(1, 7)
        for widths in itertools.combinations(range(8, 81, 8), count)
    )
    assert packing is not None and expected(*packing) < 1.03 * least  # by random batches, not by all


@pytest.mark.parametrize("batch", [1, 7, 8])
def test_sentences_of_full_length_are_not_packed(batch):
    assert packing_of(np.ones((50, 64), np.int32), batch) is None
    short = packing_of(sentences(9, 64), batch)  # of seven examples as of one, rows of one or of all
    assert short is not None and batch % short.rows == 0


def test_long_sentences_share_no_row():
    """Attention over two of them would cost more than the padding of the shorter one."""
    packing = packing_of(sentences(700, 1024), 4)
    assert packing is not None and packing.rows == 4
