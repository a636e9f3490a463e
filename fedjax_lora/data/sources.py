"""Where examples come from: the methods of the slot `data`, each a set of options and what it makes of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_args

from fedjax_lora.core.learning import Learned
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.data import digits, encode, hub, images, readers, tokens, tsv
from fedjax_lora.data.arrays import Pool, check_pools, check_target, holders, without_holders
from fedjax_lora.data.examples import Examples as Examples
from fedjax_lora.data.examples import gather
from fedjax_lora.data.options import DataConfig as DataConfig
from fedjax_lora.data.options import FilesConfig, HubConfig, ImagesConfig
from fedjax_lora.data.tables import Columns, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyConfig = DataConfig | FilesConfig | HubConfig | ImagesConfig
"""Options of one of the package's own sources."""


class Load(Protocol):
    """How examples are read."""

    def __call__(
        self, tokenizer: "PreTrainedTokenizerBase | None", name: str, learns: Learned = "label", /
    ) -> Examples:
        """The examples of which `learns` is learned; `name` is the tokenizer's in the cache of tokens.

        None and "" stand where there is no tokenizer.
        """
        ...


class Source(NamedTuple):
    """Where a run's examples come from: what a method of the slot "data" makes.

    load: see `Load`.
    tokenizes: whether it reads text, and so needs the tokenizer of the model.
    """

    load: Load
    tokenizes: bool = False


def make(options: AnyConfig, context: Context) -> Source:
    """The source of one of the package's own data sets."""
    del context

    def read(tokenizer: "PreTrainedTokenizerBase | None", name: str, learns: Learned = "label", /) -> Examples:
        return load(options, tokenizer, name, learns=learns)

    return Source(read, tokenizes=_is_text(options))


METHODS = (
    Method("data", "digits", DataConfig, make, needs=frozenset({"image_model"})),
    Method("data", "tsv", DataConfig, make, needs=frozenset({"text_model"})),
    *(Method("data", name, FilesConfig, make, needs=frozenset({"text_model"})) for name in get_args(readers.Format)),
    Method("data", "datasets", HubConfig, make),
    Method("data", "images", ImagesConfig, make, needs=frozenset({"image_model"})),
)


def arrays(
    name: str,
    *,
    train: Mapping[str, Any],
    test: Mapping[str, Any],
    class_names: Sequence[str],
    public: Mapping[str, Any] | None = None,
) -> Method:
    """A data source of arrays, to be given by `methods=[...]` and chosen by `data.source=NAME`.

    Example:
      >>> images, label = np.zeros((4, 8, 8, 1)), np.array([0, 1, 0, 1])
      >>> pool = {"image": images, "label": label}
      >>> arrays("mine", train=pool, test=pool, class_names=("no", "yes")).name
      'mine'

    Args:
      name: of the source.
      train, test: input name -> `[N, ...]`, with `label: [N]` integers. Images are floats `image: [N, height, width,
        channels]`, in [0, 1] for `vit-tiny`; text is `input_ids` and `attention_mask`, `[N, S]` integers. A model of
        one's own may read others. Floats become float32 and integers int32. A task that learns something else than a
        class reads `target`: `[N]` floats, or `[N, S]` integers for each position, -100 where nothing is learned.
        `client: [N]` integers or texts of `train` say who holds each example, for `clients.partition.kind: natural`.
      class_names: name of each label, from 0 on, and of each target that is a class.
      public: disjoint examples of the same form for central pre-training, or None.

    Raises:
      ValueError: names the array, what it must be and what it is.
    """
    if not name or name in {method.name for method in METHODS}:
        raise ValueError(f"name must be one that no other source has, got {name!r}")
    clients, client_names = holders(train)
    parts = {"train": train, "test": test} | ({} if public is None else {"public": public})
    checked, names = check_pools({part: without_holders(leaves) for part, leaves in parts.items()}, class_names)
    examples = gather(
        name,
        checked["train"],
        checked["test"],
        names,
        public=checked.get("public"),
        image_shape=_image_shape(checked),
        clients=clients,
        client_names=client_names,
    )

    def read(tokenizer: "PreTrainedTokenizerBase | None", cached: str, learns: Learned = "label", /) -> Examples:
        del tokenizer, cached
        held = {"train": examples.train, "test": examples.test, "public": examples.public}
        check_target(held, learns, len(names))
        return examples

    return Method("data", name, _options_of(name), lambda options, context: Source(read))


def _image_shape(pools: Mapping[str, Pool]) -> tuple[int, int, int] | None:
    if "image" not in pools["train"]:
        return None
    height, width, channels = pools["train"]["image"].shape[1:]
    return height, width, channels


def _options_of(name: str) -> type:
    """The options of a source of arrays: its name alone, by the key of `DataConfig`."""

    def check(self: Any) -> None:
        if self.source != name:
            raise ValueError(f"source must be {name!r}, got {self.source!r}")

    fields = [("source", str, dataclasses.field(default=name))]
    namespace = {"__post_init__": check, "__doc__": "Options of a source of arrays: none beside its name."}
    return dataclasses.make_dataclass("ArraysConfig", fields, namespace=namespace, frozen=True, kw_only=True)


def load(
    config: AnyConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tokenizer_id: str = "",
    cache_dir: str | PathLike[str] | None = None,
    learns: Learned = "label",
) -> Examples:
    """Reads the examples that `config` names.

    Args:
      config: the choice of data.
      tokenizer: turns texts into ids; needed for text.
      tokenizer_id: names the tokenizer in the cache of tokenised texts, beside what it consists of; without
        a name nothing is cached.
      cache_dir: folder of that cache; by default $FEDJAX_LORA_CACHE, or ~/.cache/fedjax-lora.
      learns: what is learned of them.

    Returns:
      The examples. Images: `image [N, height, width, channels]` float32 in [0, 1]. Text: as `encode.encode` has it.

    Raises:
      ValueError: a file is missing or malformed, the tokenizer is missing, or it can make nothing of a text.
    """
    if isinstance(config, ImagesConfig) or not _is_text(config):
        if learns != "label":
            raise ValueError(f"data.source must be one of text for a task that learns {learns}, got {config.source!r}")
        return _load_images(config)
    if tokenizer is None:
        raise ValueError(f"data.source must be one of images for a model without a tokenizer, got {config.source!r}")
    cache = tokens.Cache(tokenizer, tokenizer_id, cache_dir)
    parts, columns = _tables(config)
    template = "instruction" if isinstance(config, DataConfig) else config.template
    examples = encode.encode(config.source, parts, columns, learns, cache, config.max_length, template)
    named = {} if isinstance(config, DataConfig) else examples.columns  # a tsv file has no names of its own
    return examples._replace(notes=examples.notes + _published(config, learns), columns=named)


def _published(config: AnyConfig, learns: Learned) -> tuple[str, ...]:
    """What is known of a data set, and not in its columns."""
    if not isinstance(config, HubConfig) or not (known := config.chosen()).metrics:
        return ()
    other = f"; it was made for a task that learns {known.learns}" if learns != known.learns else ""
    return (f"{config.dataset} is scored by {', '.join(known.metrics)} where it was published{other}",)


def _is_text(config: AnyConfig) -> bool:
    if isinstance(config, HubConfig):
        return not config.image
    return config.source not in ("digits", "images")


def _load_images(config: AnyConfig) -> Examples:
    if isinstance(config, DataConfig):
        return digits.load()
    if isinstance(config, ImagesConfig):
        parts = [images.folder(path, f"data.{field}") for field, path in _files(config)]
        return images.encode("images", parts, config.image_size, config.channels)
    assert isinstance(config, HubConfig)  # what else there is, is text
    known = config.chosen()
    parts = [images.of_columns(table, known.columns) for table in hub.read(known)]
    return images.encode("datasets", parts, config.image_size, config.channels)


def _tables(config: AnyConfig) -> tuple[Sequence[Table], Columns]:
    """The tables of training and of testing, and what is said of their columns."""
    if isinstance(config, HubConfig):
        known = config.chosen()
        return hub.read(known), known.columns
    if isinstance(config, FilesConfig):
        form, delimiter = config.source, config.delimiter
        return [readers.read(form, path, f"data.{field}", delimiter) for field, path in _files(config)], config.columns
    return [tsv.read(path, f"data.{field}") for field, path in _files(config)], Columns(text="text", label="label")


def columns_of(config: Any) -> Columns:
    """What a configuration of a source of text says of the columns."""
    if isinstance(config, HubConfig):
        return config.chosen().columns
    return config.columns if isinstance(config, FilesConfig) else Columns()


def inputs(config: Any, path: str, field: str) -> Table | None:
    """Columns of a file of new texts, which is written as the training data were; None for a file of lines.

    Args:
      config: of the source of the training data.
      path: of the file, whose name says its format. field: names it in messages.

    Raises:
      ValueError: as of `readers.by_suffix`.
    """
    if config.source == "tsv" and Path(path).suffix.lower() == ".tsv" and not tsv.names_columns(path, field):
        return tsv.read(path, field)
    return readers.by_suffix(path, field, getattr(config, "delimiter", ","))


def _files(config: Any) -> Iterator[tuple[str, str]]:
    """Field and path of the two parts."""
    yield from (("train", config.train), ("test", config.test))
