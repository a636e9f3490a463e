"""Known data sets of the Hugging Face hub: where they are, which parts train and test, what their columns hold."""

import dataclasses
from typing import NamedTuple

from fedjax_lora.core.learning import Learned
from fedjax_lora.data.tables import Columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubColumns(Columns):
    """Columns of a data set by what they hold; one that is not named here goes by the common names.

    image: column of images, which makes it a data set of images.
    """

    image: str | None = None


class Known(NamedTuple):
    """A data set.

    path, subset: id on the hub, and its configuration.
    columns: which column is what.
    metrics: by which it is scored where it was published.
    train, test: splits; a test split of the hub without labels is not among them.
    learns: what it was made for.
    """

    path: str
    subset: str | None
    columns: HubColumns
    metrics: tuple[str, ...] = ("accuracy",)
    train: str = "train"
    test: str = "test"
    learns: Learned = "label"


def _glue(
    subset: str,
    text: str,
    text_pair: str | None = None,
    *metrics: str,
    test: str = "validation",
    learns: Learned = "label",
) -> Known:
    columns = HubColumns(text=text, text_pair=text_pair, label="label")
    return Known("nyu-mll/glue", subset, columns, metrics or ("accuracy",), test=test, learns=learns)


def _instructions(path: str, context: str, response: str, label: str | None = None) -> Known:
    """Instructions, which come as one split: the last twentieth tests."""
    columns = HubColumns(prompt="instruction", context=context, response=response, label=label)
    return Known(path, None, columns, ("perplexity",), "train[:95%]", "train[95%:]", "next_token")


KNOWN = {
    "cola": _glue("cola", "sentence", None, "matthews_correlation"),
    "sst2": _glue("sst2", "sentence"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", "accuracy", "f1"),
    "qqp": _glue("qqp", "question1", "question2", "accuracy", "f1"),
    "stsb": _glue("stsb", "sentence1", "sentence2", "pearson", "spearman", learns="number"),
    "mnli": _glue("mnli", "premise", "hypothesis", test="validation_matched"),
    "qnli": _glue("qnli", "question", "sentence"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "wnli": _glue("wnli", "sentence1", "sentence2"),
    "ag_news": Known("fancyzhx/ag_news", None, HubColumns(text="text", label="label")),
    "20newsgroups": Known("SetFit/20_newsgroups", None, HubColumns(text="text", label="label_text")),
    "banking77": Known("legacy-datasets/banking77", None, HubColumns(text="text", label="label")),
    "cifar10": Known("uoft-cs/cifar10", None, HubColumns(image="img", label="label")),
    "cifar100": Known("uoft-cs/cifar100", None, HubColumns(image="img", label="fine_label")),
    "dolly": _instructions("databricks/databricks-dolly-15k", "context", "response", "category"),
    "alpaca": _instructions("tatsu-lab/alpaca", "input", "output"),
}
"""Name -> data set. Their ids on the hub, with their subsets, are known too."""


def find(name: str, subset: str | None = None) -> Known | None:
    """The data set of a known name, or of an id on the hub and a subset; None for any other."""
    by_path = [known for known in KNOWN.values() if (known.path, known.subset) == (name, subset)]
    return KNOWN.get(name) or (by_path[0] if by_path else None)
