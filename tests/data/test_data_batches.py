"""Batches on the device against NumPy loops and exact counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.core.methods import Context
from fedjax_lora.data.batches import evaluation_batches, federated_dataset, gather, local_batches
from fedjax_lora.data.partition import PartitionConfig, partition
from fedjax_lora.data.sources import Examples
from fedjax_lora.training import local

N_MAX = 13
ROW = np.random.default_rng(0).permutation(50)[:N_MAX].astype(np.int32)
CASES = [(13, 4, 5), (13, 7, 13), (5, 6, 4), (3, 4, 5), (1, 3, 2), (0, 2, 3), (4, 3, 16)]  # count, steps, batch


def loop_batches(order, steps, batch_size):
    """Oracle: read through `order` around and around, never the same example twice in a batch."""
    rows, weight, at = [], [], 0
    for _ in range(steps):
        take = min(len(order), batch_size)
        rows.append([order[(at + i) % len(order)] for i in range(take)] + [None] * (batch_size - take))
        weight.append([1.0] * take + [0.0] * (batch_size - take))
        at += take
    return rows, weight


@pytest.mark.parametrize(("count", "steps", "batch_size"), CASES)
def test_rows_and_weights_equal_numpy_loop(count, steps, batch_size):
    rows, weight = local_batches(jax.random.key(1), jnp.asarray(ROW), jnp.int32(count), steps, batch_size)
    # the order itself is read off one long batch, whose valid slots hold each example once
    order, own = local_batches(jax.random.key(1), jnp.asarray(ROW), jnp.int32(count), 1, N_MAX)
    order = np.asarray(order[0])[np.asarray(own[0]) == 1]
    assert sorted(order) == sorted(ROW[:count])
    expected_rows, expected_weight = loop_batches(list(order), steps, batch_size)
    np.testing.assert_array_equal(weight, expected_weight)
    assert weight.dtype == jnp.float32 and rows.dtype == jnp.int32
    for got, expected in zip(np.asarray(rows).ravel(), np.ravel(expected_rows), strict=True):
        assert got in ROW if expected is None else got == expected


@pytest.mark.parametrize(("count", "steps", "batch_size"), CASES)
def test_a_client_computes_the_samples_that_its_batches_hold(count, steps, batch_size):
    """Counting: what the radio charges is what has weight, not the places of a batch that stay empty."""
    _, weight = local_batches(jax.random.key(1), jnp.asarray(ROW), jnp.int32(count), steps, batch_size)
    nothing = dict.fromkeys(("model", "adapter", "task", "sparsifier", "aggregation", "drift"))  # work asks none of it
    config = local.LocalConfig(steps=steps, batch_size=batch_size)
    context = Context(num_clients=1, cohort_size=1, local=config, made=nothing)
    trainer = local.make(local.LocalTrainingOptions(), context)
    assert trainer.work(jnp.int32(count)).samples == weight.sum()


@pytest.mark.parametrize(("count", "steps", "batch_size"), [(13, 9, 4), (5, 7, 3), (3, 4, 5)])
def test_no_example_is_read_again_before_all_were(count, steps, batch_size):
    """Counting law: after any number of reads, two examples' counts differ by at most one."""
    rows, weight = local_batches(jax.random.key(2), jnp.asarray(ROW), jnp.int32(count), steps, batch_size)
    reads = np.asarray(rows).ravel()[np.asarray(weight).ravel() == 1]
    for n in range(1, len(reads) + 1):
        counts = [np.sum(reads[:n] == row) for row in ROW[:count]]
        assert max(counts) - min(counts) <= 1 and sum(counts) == n


def test_permutations_are_uniform_against_closed_form():
    """Each of the 3! orders has probability 1/6; standard error over 3000 keys is 0.007."""
    keys = jax.random.split(jax.random.key(3), 3000)
    rows, _ = jax.vmap(lambda key: local_batches(key, jnp.arange(5), jnp.int32(3), 1, 3))(keys)
    _, counts = np.unique(np.asarray(rows[:, 0]), axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)


@pytest.mark.parametrize(("count", "batch_size"), [(3, 8), (8, 8), (11, 8)])
def test_masked_mean_equals_mean_over_true_examples(count, batch_size):
    """NumPy mean over the examples that were read, each once: the padding has no part in it."""
    values = np.random.default_rng(1).normal(size=50).astype(np.float32)
    rows, weight = local_batches(jax.random.key(4), jnp.asarray(ROW), jnp.int32(count), 1, batch_size)
    loss = gather({"x": jnp.asarray(values)}, rows)["x"]
    mean = (weight * loss).sum() / weight.sum()
    read = np.asarray(rows)[np.asarray(weight) == 1]
    assert len(set(read)) == min(count, batch_size) and set(read) <= set(ROW[:count])
    np.testing.assert_allclose(mean, values[read].astype(np.float64).mean(), rtol=1e-5)


def test_padding_of_the_index_changes_nothing():
    """Invariance: a longer table of other clients' making gives the same batches."""
    short = jnp.asarray(ROW[:6])
    long = jnp.concatenate([short, jnp.full(31, 49, jnp.int32)])
    for count, batch_size in ((6, 4), (2, 4)):
        a, wa = local_batches(jax.random.key(5), short, jnp.int32(count), 5, batch_size)
        b, wb = local_batches(jax.random.key(5), long, jnp.int32(count), 5, batch_size)
        np.testing.assert_array_equal(wa, wb)
        np.testing.assert_array_equal(np.where(wa, a, -1), np.where(wb, b, -1))


def test_places_that_no_client_fills_change_nothing():
    """Invariance: a batch as large as the largest client has the rows and weights of a larger one, and no others."""
    key, row = jax.random.key(5), jnp.asarray(ROW)
    for count in (13, 7, 0):
        few, weight = local_batches(key, row, jnp.int32(count), 4, 13)
        many, all_weight = local_batches(key, row, jnp.int32(count), 4, 40)
        np.testing.assert_array_equal(many[:, :13], few)
        np.testing.assert_array_equal(all_weight[:, :13], weight)
        assert not all_weight[:, 13:].any()


def test_jit_equals_eager_and_vmap_equals_loop_and_traces_once():
    traces = []

    def batches(key, row, count):
        traces.append(count)
        return local_batches(key, row, count, 3, 4)

    index = jnp.asarray(np.random.default_rng(2).integers(0, 50, (5, N_MAX)), jnp.int32)
    count = jnp.asarray([13, 1, 4, 0, 7], jnp.int32)
    keys = jax.random.split(jax.random.key(6), 5)
    jitted = jax.jit(batches)
    one_by_one = [jitted(*arguments) for arguments in zip(keys, index, count, strict=True)]
    assert len(traces) == 1
    together = jax.vmap(batches)(keys, index, count)
    for k, (rows, weight) in enumerate(one_by_one):
        eager = local_batches(keys[k], index[k], count[k], 3, 4)
        np.testing.assert_array_equal(rows, eager[0])
        np.testing.assert_array_equal(weight, eager[1])
        np.testing.assert_array_equal(rows, together[0][k])
        np.testing.assert_array_equal(weight, together[1][k])


def test_gather_equals_numpy_indexing():
    pool = {
        "image": np.random.default_rng(3).normal(size=(50, 2, 3, 1)).astype(np.float32),
        "label": np.arange(50),
    }
    rows = np.asarray([[4, 0, 9], [4, 4, 49]])
    batch = gather({name: jnp.asarray(value) for name, value in pool.items()}, jnp.asarray(rows))
    assert batch["image"].shape == (2, 3, 2, 3, 1)
    for name, value in batch.items():
        np.testing.assert_array_equal(value, pool[name][rows])


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "num_devices", "shape"),
    [
        (10, 4, 1, (3, 4)),
        (8, 4, 1, (2, 4)),
        (1, 1, 1, (1, 1)),
        (10, 2, 4, (8, 2)),
        (3, 5, 2, (2, 2)),
        (7, 10**12, 1, (1, 7)),
        (7, 10**12, 3, (3, 3)),
    ],
)
def test_evaluation_batches_cover_the_pool_once_in_order(num_examples, batch_size, num_devices, shape):
    """Conservation: the rows of weight 1 are 0 ... N - 1. By hand: no batch is larger than a device's share."""
    rows, weight = evaluation_batches(num_examples, batch_size, num_devices)
    assert rows.shape == weight.shape == shape
    np.testing.assert_array_equal(rows[weight == 1], np.arange(num_examples))
    assert weight.sum() == num_examples
    assert rows.min() >= 0 and rows.max() < num_examples


def make_examples(num_train):
    pool = {"x": np.arange(num_train, dtype=np.float32), "label": np.arange(num_train, dtype=np.int32) % 3}
    return Examples("toy", pool, {"x": np.zeros(2, np.float32)}, None, ("a", "b", "c"), None, 0, "")


def test_federated_dataset_reads_as_the_partition_does():
    """NumPy loop: each client's rows, gathered on the device, are those of the host's table."""
    examples = make_examples(29)
    split = partition(PartitionConfig(), examples.train["label"], 6, seed=0)
    dataset = federated_dataset(examples, split)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(dataset))
    for k in range(6):
        x = gather(dataset.train, dataset.index[k])["x"][: int(dataset.count[k])]
        np.testing.assert_array_equal(x, examples.train["x"][split.index[k, : split.count[k]]])
    np.testing.assert_array_equal(dataset.test["x"], examples.test["x"])


def test_partitions_of_many_seeds_have_the_shape_of_one_program():
    """Counting: the largest client decides the width, and differs from seed to seed; powers of two do not."""
    examples = make_examples(300)
    splits = [partition(PartitionConfig(alpha=1.0), examples.train["label"], 6, seed) for seed in range(5)]
    widths = {federated_dataset(examples, split).index.shape[1] for split in splits}
    assert len({split.index.shape[1] for split in splits}) == 5 and widths == {128}


def test_partition_of_a_larger_pool_is_refused():
    split = partition(PartitionConfig(), np.arange(30) % 3, 6, seed=0)
    with pytest.raises(ValueError, match=r"^partition must hold rows of the training pool, 0 to 28, got 29$"):
        federated_dataset(make_examples(29), split)
