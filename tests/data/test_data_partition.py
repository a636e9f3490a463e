"""Partitions: conservation, sizes, and the limits of each kind against closed forms."""

import subprocess
import sys

import numpy as np
import pytest

from fedjax_lora.data.partition import ClientsConfig, PartitionConfig, partition

KINDS = {
    "iid": PartitionConfig(kind="iid"),
    "mild": PartitionConfig(alpha=0.5),
    "near_iid": PartitionConfig(alpha=1e6),
    "extreme": PartitionConfig(alpha=1e-3),
    "degenerate": PartitionConfig(alpha=1e-12),
    "shards": PartitionConfig(kind="shards"),
    "large_minimum": PartitionConfig(alpha=0.1, min_examples=7),
}


def make_labels(num_examples=317, num_classes=6, seed=3):
    """Unbalanced labels, so that no class size divides the number of clients."""
    weights = np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum()
    return np.random.default_rng(seed).choice(num_classes, num_examples, p=weights).astype(np.int32)


def held(result):
    """Rows of each client, read by a plain loop."""
    return [list(row[:count]) for row, count in zip(result.index, result.count, strict=True)]


def label_counts(result, labels):
    """`[K, classes]`."""
    return np.array([np.bincount(labels[rows], minlength=labels.max() + 1) for rows in held(result)])


@pytest.mark.parametrize("num_clients", [1, 11, 45])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_conservation_every_example_has_one_owner(config, num_clients):
    labels = make_labels()
    result = partition(config, labels, num_clients, seed=0)
    clients = held(result)
    assert sorted(row for rows in clients for row in rows) == list(range(len(labels)))
    assert min(map(len, clients)) >= config.min_examples
    assert result.index.shape == (num_clients, max(map(len, clients)))
    assert result.index.dtype == result.count.dtype == np.int32
    for row, count in zip(result.index, result.count, strict=True):
        assert (row[count:] == row[0]).all()


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_as_many_clients_as_examples_can_feed_forces_equal_sizes(config):
    """Closed form: with K * min_examples = N every client holds exactly min_examples."""
    labels = make_labels(num_examples=23 * config.min_examples)
    result = partition(config, labels, num_clients=23, seed=1)
    np.testing.assert_array_equal(result.count, config.min_examples)


def test_too_many_clients_is_one_line_that_names_the_field():
    with pytest.raises(ValueError, match=r"^clients\.count must be at most 4 \(9 examples, at least 2 .*got 5$"):
        partition(PartitionConfig(min_examples=2), np.arange(9), num_clients=5, seed=0)


def test_near_iid_limit_against_closed_form_counts():
    """alpha -> inf: every share is 1/K, so a client holds n_label / K of each label, rounded up or down."""
    labels = make_labels()
    counts = label_counts(partition(KINDS["near_iid"], labels, 11, seed=4), labels)
    # the shares themselves still deviate by about 1e-3 of their value
    assert np.abs(counts - np.bincount(labels) / 11).max() < 1.2


def test_rounding_favours_no_client():
    """Expectation: with fewer examples of a label than clients, each client's chance is still n / K."""
    labels = np.repeat(np.arange(3), (5, 7, 400))
    counts = np.mean([label_counts(partition(KINDS["near_iid"], labels, 16, s), labels) for s in range(400)], axis=0)
    # standard error of a share of 5/16 over 400 seeds is 0.023
    np.testing.assert_allclose(counts[:, :2], np.tile([5 / 16, 7 / 16], (16, 1)), atol=0.1)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_concentration_against_dirichlet_second_moment(alpha):
    """Closed form: E sum_k p_k^2 = (alpha + 1) / (K alpha + 1) for shares p of a symmetric Dirichlet."""
    num_clients, per_label = 8, 4000
    labels = np.repeat(np.arange(5), per_label)
    squares = []
    for seed in range(40):
        counts = label_counts(partition(PartitionConfig(alpha=alpha), labels, num_clients, seed), labels)
        squares.append(((counts / per_label) ** 2).sum(axis=0))
    squares = np.asarray(squares)
    error = squares.std() / np.sqrt(squares.size)
    assert abs(squares.mean() - (alpha + 1) / (num_clients * alpha + 1)) < 4 * error + 1e-3


def test_extreme_limit_gives_each_label_to_one_client():
    """alpha -> 0: one client holds all of a label, but for what fills up the empty ones."""
    labels = make_labels()
    num_clients = 9
    counts = label_counts(partition(KINDS["degenerate"], labels, num_clients, seed=5), labels)
    assert (counts.max(axis=0) >= np.bincount(labels) - num_clients).all()


def test_iid_sizes_differ_by_at_most_one():
    count = partition(KINDS["iid"], make_labels(), 45, seed=2).count
    assert sorted(set(count)) == [317 // 45, 317 // 45 + 1]


def test_shards_hold_as_many_labels_as_sorted_runs_allow():
    """Closed form: balanced labels and shards that divide a label give at most `shards_per_client` labels."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 24))
    result = partition(PartitionConfig(kind="shards", shards_per_client=2), labels, 20, seed=6)
    counts = label_counts(result, labels)
    np.testing.assert_array_equal(result.count, 12)
    assert (counts > 0).sum(axis=1).max() == 2
    assert set(counts[counts > 0]) <= {6, 12}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_hash_is_the_same_for_the_same_seed_alone(config):
    """Invariance: a second call, and nothing else, gives the same partition and hash."""
    labels = make_labels()
    first, again, other = (partition(config, labels, 11, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.index, again.index)
    assert first.hash == again.hash != other.hash
    assert first.hash != partition(config, labels, 12, seed=7).hash


def test_hash_is_the_same_in_another_process():
    """Invariance: hash randomisation and process state play no part."""
    program = (
        "import numpy as np; from fedjax_lora.data.partition import PartitionConfig, partition;"
        "print(partition(PartitionConfig(), np.arange(40) % 3, 7, 5).hash)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == partition(PartitionConfig(), np.arange(40) % 3, 7, 5).hash


def test_more_shards_a_client_than_examples_are_refused():
    with pytest.raises(ValueError, match=r"^clients\.partition\.shards_per_client must be at most 31, .*, got 32$"):
        partition(PartitionConfig(kind="shards", shards_per_client=32), np.arange(31) % 3, 10, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PartitionConfig(kind="even"),
            r"^kind must be one of iid, dirichlet, shards, natural, flwr, sampled, got 'even'$",
        ),
        (lambda: PartitionConfig(alpha=0.0), r"^alpha must be positive and finite, got 0.0$"),
        (lambda: PartitionConfig(alpha=float("nan")), r"^alpha must be positive and finite, got nan$"),
        (lambda: PartitionConfig(shards_per_client=0), r"^shards_per_client must be at least 1, got 0$"),
        (lambda: PartitionConfig(min_examples=0), r"^min_examples must be at least 1, got 0$"),
        (lambda: ClientsConfig(count=0), r"^count must be at least 1, got 0$"),
        (lambda: ClientsConfig(count=5, per_round=6), r"^per_round must be between 1 and count = 5, got 6$"),
        (lambda: ClientsConfig(count=5, per_round=0), r"^per_round must be between 1 and count = 5, got 0$"),
    ],
)
def test_config_errors_name_field_value_and_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
