"""Options of the data sources: the section `data` of a configuration, one class for each kind of source."""

import dataclasses
from typing import Literal, get_args

from fedjax_lora.data import known
from fedjax_lora.data.known import HubColumns
from fedjax_lora.data.readers import Format
from fedjax_lora.data.tables import Columns
from fedjax_lora.data.texts import Template

SourceName = Literal["digits", "tsv"]
Channels = Literal[1, 3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples to learn from.

    source: `digits`, 8x8 images that come with scikit-learn; or `tsv`, files of `sentence<TAB>label` lines.
    train, test: paths of the files; for `tsv` only.
    max_length: tokens of a sentence, special ones included; longer sentences are cut. For `tsv` only.
    """

    source: SourceName = "digits"
    train: str | None = None
    test: str | None = None
    max_length: int = 64

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        if self.source not in get_args(SourceName):
            raise ValueError(f"source must be one of {', '.join(get_args(SourceName))}, got {self.source!r}")
        for field, path in (("train", self.train), ("test", self.test)):
            if self.source == "tsv" and not path:
                raise ValueError(f"{field} must be the path of a file when source is tsv, got {path!r}")
            if self.source == "digits" and path is not None:
                raise ValueError(f"{field} must be absent when source is digits, got {path!r}")
        _check_length(self.max_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Tables with named columns, from files.

    source: `csv`, with a header; `jsonl`, an object in each line; or `parquet`.
    train, test: paths of the files.
    columns: which column is what.
    delimiter: what parts the fields of a row; for `csv` only.
    template: how a prompt is written before its response: with headings, or as it is.
    max_length: tokens of a text, special ones included; longer texts are cut.
    """

    source: Format
    train: str | None = None
    test: str | None = None
    columns: Columns = dataclasses.field(default_factory=Columns)
    delimiter: str = ","
    template: Template = "instruction"
    max_length: int = 64

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        for field, path in (("train", self.train), ("test", self.test)):
            if not path:
                raise ValueError(f"{field} must be the path of a file when source is {self.source}, got {path!r}")
        if len(self.delimiter) != 1 or self.delimiter in '\r\n"':
            raise ValueError(f"delimiter must be one character, and no quote or line break, got {self.delimiter!r}")
        _check_template(self.template)
        _check_length(self.max_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A data set of Hugging Face, from its hub or from a folder.

    dataset: one of the known names, an id of the hub, or a folder of `save_to_disk`.
    subset: its configuration, where it has several.
    train_split, test_split: names of splits, or parts of them as `train[:90%]`; by default those of the known name,
      or `train` and `test`.
    columns: which column is what.
    template: how a prompt is written before its response: with headings, or as it is.
    max_length: tokens of a text, special ones included; longer texts are cut.
    image_size: height and width that images are scaled to.
    channels: of images, 1 for gray and 3 for red, green and blue.
    """

    source: Literal["datasets"] = "datasets"
    dataset: str | None = None
    subset: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    columns: HubColumns = dataclasses.field(default_factory=HubColumns)
    template: Template = "instruction"
    max_length: int = 64
    image_size: int = 32
    channels: Channels = 3

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        if not self.dataset:
            allowed = f"one of {', '.join(known.KNOWN)}, an id of the Hugging Face hub, or a folder of save_to_disk"
            raise ValueError(f"dataset must be {allowed}, got {self.dataset!r}")
        for field, split in (("train_split", self.train_split), ("test_split", self.test_split)):
            if split == "":
                raise ValueError(f"{field} must be the name of a split, got ''")
        _check_template(self.template)
        _check_length(self.max_length)
        _check_image(self.image_size, self.channels)

    @property
    def image(self) -> bool:
        """Whether it is a data set of images."""
        return self.chosen().columns.image is not None

    def chosen(self) -> known.Known:
        """Where the data set is and what its columns hold: what is known of the name, and over it what is given."""
        name = str(self.dataset)
        found = known.find(name, self.subset) or known.Known(name, None, HubColumns(), ())
        given = self.columns.given()
        instead = ("prompt", "context", "response") if "text" in given else ()
        own = {role: column for role, column in found.columns.given().items() if role not in instead}
        return found._replace(
            subset=self.subset or found.subset,
            train=self.train_split or found.train,
            test=self.test_split or found.test,
            columns=HubColumns(**{**own, **given}),
        )

    def needs(self) -> dict[str, str]:
        """A model of what the data set holds."""
        return {"image_model" if self.image else "text_model": "dataset"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Folders of images, in each a folder for each class.

    train, test: paths of the folders.
    image_size: height and width that images are scaled to.
    channels: of images, 1 for gray and 3 for red, green and blue.
    """

    source: Literal["images"] = "images"
    train: str | None = None
    test: str | None = None
    image_size: int = 32
    channels: Channels = 3

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        for field, path in (("train", self.train), ("test", self.test)):
            if not path:
                raise ValueError(f"{field} must be the path of a folder when source is images, got {path!r}")
        _check_image(self.image_size, self.channels)


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")


def _check_template(template: str) -> None:
    if template not in get_args(Template):
        raise ValueError(f"template must be one of {', '.join(get_args(Template))}, got {template!r}")


def _check_image(image_size: int, channels: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if channels not in get_args(Channels):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
