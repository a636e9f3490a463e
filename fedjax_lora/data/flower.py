"""Partitions by the partitioners of Flower Datasets, or of any library with their interface."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_lora.core.errors import reason_of

_MODULE = "flwr_datasets.partitioner"
_KEY = "clients.partition"
_OF_NATURAL_IDS = ("NaturalIdPartitioner", "GroupedNaturalIdPartitioner")


def owners(
    partitioner: str,
    options: Mapping[str, Any],
    labels: np.ndarray,
    clients: np.ndarray | None,
    num_clients: int,
    seed: int,
) -> np.ndarray:
    """`[N]` owner of each example, -1 for none, as a partitioner deals a table.

    Its columns are `label` and, where the data say who holds an example, `client`.
    Its options `num_partitions`, `partition_by` and `seed`, where it has them, are the number of clients, "label"
    ("client" of natural ids, where the data have one) and the run's seed, unless `options` says otherwise.

    Raises:
      ValueError: the library is not installed or has no such partitioner, its options are wrong, it makes another
        number of partitions, or it gives an example to several clients.
    """
    kind = _kind(partitioner)
    wanted = inspect.signature(kind).parameters
    by = "client" if partitioner in _OF_NATURAL_IDS and clients is not None else "label"
    defaults = {"num_partitions": num_clients, "partition_by": by, "seed": seed}
    given = {name: value for name, value in defaults.items() if name in wanted} | _plain(options)
    columns = {"row": np.arange(len(labels)), "label": labels} | ({} if clients is None else {"client": clients})
    try:
        made = kind(**given)
        made.dataset = _dataset(columns)
        count = made.num_partitions
        rows = [np.asarray(made.load_partition(number)["row"], int) for number in range(count)]
    except Exception as error:  # those of another library
        raise ValueError(f"{_KEY}.options must be options of {partitioner}, got {given}: {reason_of(error)}") from None
    if count != num_clients:
        raise ValueError(f"clients.count must be {count}, the partitions of {partitioner}, got {num_clients}")
    dealt = np.bincount(np.concatenate(rows), minlength=len(labels))
    if several := int((dealt > 1).sum()):
        raise ValueError(
            f"{_KEY}.partitioner must give an example to one client at most, got {partitioner}, which gives {several} "
            f"of {len(labels)} to several"
        )
    owner = np.full(len(labels), -1, np.int64)
    for client, own in enumerate(rows):
        owner[own] = client
    return owner


def _kind(partitioner: str) -> type:
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ValueError(
            f"{_KEY}.kind must be another than flwr where flwr-datasets is not installed ({reason_of(error)}); it is "
            "after pip install 'fedjax-lora[flwr]'"
        ) from None
    names = [name for name, value in vars(module).items() if inspect.isclass(value) and not inspect.isabstract(value)]
    if partitioner not in names:
        raise ValueError(f"{_KEY}.partitioner must be one of {', '.join(sorted(names))}, got {partitioner!r}")
    return getattr(module, partitioner)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as these libraries read them: lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _dataset(columns: Mapping[str, np.ndarray]) -> Any:
    from datasets import Dataset  # of an extra, and slow to import

    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
