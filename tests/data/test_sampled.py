"""Populations whose rows are drawn from ids: purity, support, and shares of labels against those of the Dirichlet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lora.data.partition import PartitionConfig, partition
from fedjax_lora.data.sampled import sampled

LABELS = np.array([4, 7, 7, 4, 9, 7, 7, 9, 7, 7])


def label_counts(clients, ids):
    """`[C, labels]`."""
    labels = LABELS[np.asarray(clients[ids])]
    return (labels[..., None] == np.unique(LABELS)).sum(1)


def test_rows_are_a_pure_function_of_seed_and_id():
    """Invariance: to the order of a cohort, to who else is in it, to `jit`, and to how many clients there are."""
    clients = sampled(LABELS, examples=6, alpha=0.5, seed=3)
    ids = jnp.array([5, 0, 999_999])
    rows = np.asarray(clients[ids])
    np.testing.assert_array_equal(jax.jit(lambda clients, ids: clients[ids])(clients, ids[::-1]), rows[::-1])
    np.testing.assert_array_equal(clients[5], rows[0])
    assert rows.dtype == np.int32
    assert (rows[0] != rows[1]).any()
    assert (np.asarray(sampled(LABELS, examples=6, alpha=0.5, seed=4)[ids]) != rows).any()


@pytest.mark.parametrize("alpha", [0.3, 5.0])
def test_shares_of_labels_have_the_moments_of_the_dirichlet(alpha):
    """Closed form: a share of mean p has the variance p (1 - p) / (a + 1), where the concentrations sum to a."""
    clients, number = sampled(LABELS, examples=200, alpha=alpha, seed=0), 4000
    shares = label_counts(clients, jnp.arange(number)) / 200
    mean = np.array([0.2, 0.6, 0.2])
    spread = mean * (1 - mean)
    variance = spread / (3 * alpha + 1)
    variance += (spread - variance) / 200  # of 200 draws by these shares
    np.testing.assert_allclose(shares.mean(0), mean, atol=5 * np.sqrt(variance.max() / number))
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.15)


def test_rows_of_a_label_are_alike_and_large_alpha_is_iid():
    """Chi-square: of all rows, each is drawn as often as any other; 45.6 is the 1 - 1e-6 quantile for 9 degrees."""
    rows = np.asarray(sampled(LABELS, examples=50, alpha=1e6, seed=1)[jnp.arange(200)])
    observed = np.bincount(rows.ravel(), minlength=10)
    assert np.sum((observed - 1000) ** 2 / 1000) < 45.6


def test_a_partition_says_how_many_and_hashes_all_that_decides():
    config = PartitionConfig(kind="sampled", examples=6)
    drawn = partition(config, LABELS, 1_000_000, seed=3)
    assert drawn.count.shape == (1_000_000,) and (drawn.count == 6).all()
    np.testing.assert_array_equal(drawn.index[8], sampled(LABELS, examples=6, alpha=0.5, seed=3)[8])
    others = [
        partition(config, LABELS, 1_000_000, seed=4),
        partition(config, LABELS, 999_999, seed=3),
        partition(config, LABELS[::-1], 1_000_000, seed=3),
        partition(PartitionConfig(kind="sampled", examples=7), LABELS, 1_000_000, seed=3),
        partition(PartitionConfig(kind="sampled", examples=6, alpha=0.6), LABELS, 1_000_000, seed=3),
    ]
    assert len({drawn.hash, *(other.hash for other in others)}) == 6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "sampled"}, "^examples must be at least 1 when kind is sampled, got None$"),
        ({"kind": "sampled", "examples": 0}, "^examples must be at least 1 when kind is sampled, got 0$"),
        ({"kind": "iid", "examples": 3}, "^examples must be absent when kind is iid, got 3$"),
    ],
)
def test_a_wrong_number_of_examples_is_one_line(options, line):
    with pytest.raises(ValueError, match=line):
        PartitionConfig(**options)
