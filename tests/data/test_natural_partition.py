"""Partitions that come from elsewhere: the clients of the data, and partitioners with the interface of Flower's."""

import sys
import types
from abc import ABC, abstractmethod

import datasets
import numpy as np
import pytest

from fedjax_lora.core.mapping import Mapped
from fedjax_lora.data.partition import PartitionConfig, partition

LABELS = (np.arange(30) % 3).astype(np.int32)
HOLDERS = (np.arange(30) ** 2 % 4).astype(np.int32)  # 0 and 1 alone
NATURAL = PartitionConfig(kind="natural")


def rows_of(result):
    return [sorted(row[:count]) for row, count in zip(result.index, result.count, strict=True)]


def test_a_natural_partition_is_what_the_data_say_loop():
    found = partition(NATURAL, LABELS, 2, 0, HOLDERS)
    assert rows_of(found) == [[i for i in range(30) if HOLDERS[i] == client] for client in range(2)]
    assert found.hash == partition(NATURAL, LABELS, 2, 7, HOLDERS).hash  # no seed plays a part


@pytest.mark.parametrize(
    ("clients", "holders", "more", "message"),
    [
        (3, HOLDERS, {}, r"^clients\.count must be 2, the clients of the data, where .*kind is natural, got 3$"),
        (2, None, {}, r"^data must say who holds each example where .*kind is natural, by a column `client` or data"),
        (2, HOLDERS, {"min_examples": 16}, r"^clients\.partition\.min_examples must be at most 15,.*smallest client"),
    ],
)
def test_a_natural_partition_that_does_not_fit_is_one_line(clients, holders, more, message):
    with pytest.raises(ValueError, match=message):
        partition(PartitionConfig(kind="natural", **more), LABELS, clients, 0, holders)


class Partitioner(ABC):
    """The interface of `flwr_datasets.partitioner.Partitioner`: a data set that is set once, numbers, partitions."""

    _dataset: datasets.Dataset | None = None

    @property
    def dataset(self):
        return self._dataset

    @dataset.setter
    def dataset(self, value):
        if not isinstance(value, datasets.Dataset):
            raise TypeError(f"a Dataset, but given {type(value)}.")
        self._dataset = value

    @property
    @abstractmethod
    def num_partitions(self): ...

    @abstractmethod
    def load_partition(self, partition_id): ...


class LabelPartitioner(Partitioner):
    """Client k holds the labels k, k + K, ..., of those that are kept."""

    def __init__(self, num_partitions: int, partition_by: str, seed: int = 42, keep=(0, 1, 2), twice: bool = False):
        if not isinstance(keep, list | tuple):
            raise ValueError("keep must be a list\nof labels")
        self.given, self.twice = (num_partitions, partition_by, seed, keep), twice
        LabelPartitioner.last = self

    @property
    def num_partitions(self):
        return self.given[0]

    def load_partition(self, partition_id):
        labels = np.asarray(self.dataset[self.given[1]])
        own = np.isin(labels, self.given[3]) & (self.twice | (labels % self.num_partitions == partition_id))
        return self.dataset.select(np.flatnonzero(own))


class NaturalIdPartitioner(Partitioner):
    """As many partitions as there are values."""

    def __init__(self, partition_by: str):
        self.by = partition_by

    @property
    def num_partitions(self):
        return len(set(self.dataset[self.by]))

    def load_partition(self, partition_id):
        values = self.dataset[self.by]
        return self.dataset.filter(lambda row: row[self.by] == sorted(set(values))[partition_id])


@pytest.fixture
def flower(monkeypatch):
    """A stand-in for the library, which needs other versions of the project's libraries than the tests have."""
    module = types.ModuleType("flwr_datasets.partitioner")
    for kind in (Partitioner, LabelPartitioner, NaturalIdPartitioner):
        setattr(module, kind.__name__, kind)
    parent = types.ModuleType("flwr_datasets")
    parent.partitioner = module
    monkeypatch.setitem(sys.modules, "flwr_datasets", parent)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", module)


def flwr(partitioner="LabelPartitioner", min_examples=1, **options):
    return PartitionConfig(kind="flwr", partitioner=partitioner, options=Mapped(options), min_examples=min_examples)


def test_a_partitioner_deals_the_rows_and_is_given_number_label_and_seed_loop(flower):
    found = partition(flwr(), LABELS, 3, 11)
    assert rows_of(found) == [[i for i in range(30) if LABELS[i] == client] for client in range(3)]
    assert LabelPartitioner.last.given == (3, "label", 11, (0, 1, 2))
    partition(flwr(seed=5, keep=(2, 1, 0)), LABELS, 3, 11)
    assert LabelPartitioner.last.given == (3, "label", 5, [2, 1, 0])


def test_a_partitioner_of_natural_ids_goes_by_the_clients(flower):
    found = partition(flwr("NaturalIdPartitioner"), LABELS, 2, 0, HOLDERS)
    assert found.hash == partition(NATURAL, LABELS, 2, 0, HOLDERS).hash


def test_an_empty_client_is_filled_up(flower):
    """Conservation: labels 0 to 2 leave the fourth client without an example, and it is given one."""
    found = partition(flwr(), LABELS, 4, 0)
    assert sorted(found.count) == [1, 9, 10, 10]
    assert sorted(row for rows in rows_of(found) for row in rows) == list(range(30))


def test_examples_that_a_partitioner_leaves_out_are_nobodys_loop(flower):
    found = partition(flwr(keep=[0, 2]), LABELS, 3, 0)
    kept = [[i for i in range(30) if LABELS[i] == client] for client in (0, 2)]
    held = sorted(row for rows in rows_of(found) for row in rows)
    assert held == sorted([*kept[0], *kept[1]])  # the second client's one example is from another's
    assert sorted(found.count) == [1, 9, 10]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (flwr("Nothing"), r"partitioner must be one of LabelPartitioner, NaturalIdPartitioner, got 'Nothing'$"),
        (flwr(keep=3), r"options must be options of LabelPartitioner, got .*'keep': 3}: keep must be a list$"),
        (flwr(colour=1), r"options must be options of LabelPartitioner, got .* unexpected keyword argument 'colour'$"),
        (flwr(twice=True), r"give an example to one client at most, got .* which gives 30 of 30 to several$"),
        (
            flwr(keep=[0], min_examples=4),
            r"^clients\.count must be at most 2 \(10 examples that LabelPartitioner deals, ",
        ),
        (flwr(keep=[]), r"^clients\.count must be at most 0 \(0 .* LabelPartitioner deals, at least 1 .*\), got 3$"),
        (flwr(num_partitions=4), r"^clients\.count must be 4, the partitions of LabelPartitioner, got 3$"),
    ],
)
def test_a_partitioner_that_does_not_fit_is_one_line(flower, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        partition(config, LABELS, 3, 0)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ValueError, match=r"flwr-datasets is not installed .* pip install 'fedjax-lora\[flwr\]'$"):
        partition(flwr(), LABELS, 3, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "flwr"}, r"^partitioner must be a class of flwr_datasets\.partitioner when kind is flwr, got None$"),
        ({"partitioner": "A"}, r"^partitioner must be absent when kind is dirichlet, got 'A'$"),
        ({"options": Mapped(alpha=1)}, r"^options must be absent when kind is dirichlet, got \{'alpha': 1\}$"),
    ],
)
def test_config_errors_name_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        PartitionConfig(**fields)
