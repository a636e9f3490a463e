"""Data sets of Hugging Face, by the library `datasets`: from the hub, from its cache, or from a folder."""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from fedjax_lora.core.errors import reason_of
from fedjax_lora.data.known import Known
from fedjax_lora.data.readers import missing_library
from fedjax_lora.data.tables import Table, shorten_list

if TYPE_CHECKING:
    from datasets import Dataset

_OFFLINE = (
    "without a network it must be a folder of save_to_disk, or in the cache of datasets already (HF_HOME), "
    "then with HF_HUB_OFFLINE=1"
)


def read(known: Known) -> tuple[Table, Table]:
    """The training and the test split as tables with the columns of the data set; code from the hub is never run.

    Raises:
      ValueError: the library is not installed, the data set is not there or cannot be read, or has no such split.
    """
    if importlib.util.find_spec("datasets") is None:
        raise missing_library("datasets", "the library datasets")
    fields = (("train_split", known.train), ("test_split", known.test))
    whole = _folder(known.path) if os.path.isdir(known.path) else None
    train, test = (
        _table(
            _remote(known, field, split) if whole is None else _part(whole, field, split),
            f"data.{field} {known.path} {split}",
        )
        for field, split in fields
    )
    return train, test


def _remote(known: Known, field: str, split: str) -> "Dataset":
    """A split of a data set of the hub."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    named = known.path if known.subset is None else f"{known.path} with subset {known.subset}"
    try:
        return datasets.load_dataset(known.path, known.subset, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(f"data.dataset must be reachable, got {named}: {reason_of(error)}; {_OFFLINE}") from None
    except Exception as error:  # those of several libraries
        raise ValueError(
            f"data.dataset and data.{field} must name a data set and a split of it, got {named} and {split}: "
            f"{reason_of(error)}"
        ) from None


def _folder(path: str) -> dict[str, "Dataset"]:
    """The splits of a folder of `save_to_disk`; a data set without splits is `train`."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(path)
    except Exception as error:  # those of several libraries
        raise ValueError(f"data.dataset must be a folder of save_to_disk, got {path}: {reason_of(error)}") from None
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return {str(name): dataset for name, dataset in splits.items()}


def _part(splits: dict[str, "Dataset"], field: str, split: str) -> "Dataset":
    """A split, or a part of it, that `split` names as in `train[:90%]`."""
    import datasets

    lengths = {name: len(dataset) for name, dataset in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except Exception as error:
        raise ValueError(
            f"data.{field} must be one of {shorten_list(splits)}, or a part of one as train[:90%], got {split}: "
            f"{reason_of(error)}"
        ) from None
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(chosen)


def _table(dataset: "Dataset", name: str) -> Table:
    """A split with its columns, which are read when they are asked for, and the words that its integers stand for."""
    import datasets

    if not len(dataset):
        raise ValueError(f"{name}: must hold at least one row, got none")
    classes = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, datasets.ClassLabel):
            classes[column] = tuple(inner.names)
    columns = {column: dataset[column] for column in dataset.column_names}
    return Table(name, columns, range(1, len(dataset) + 1), "row", classes)
