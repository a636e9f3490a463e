"""Examples on the host, as NumPy arrays: digits, sentences from a tab-separated file, or a user's own arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from fedjax_lora.core.methods import Context, Method
from fedjax_lora.data import tokens, tsv
from fedjax_lora.data.arrays import Pool, check_pools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceName = Literal["digits", "tsv"]

# The split of the digits is part of the data set: every experiment, whatever its seed, sees the same one.
_DIGITS_SEED = 2024
_DIGITS_TEST_SHARE = 0.2
_DIGITS_PUBLIC_SHARE = 0.45
_DIGITS_PUBLIC_CLASSES = range(5)


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
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")


class Examples(NamedTuple):
    """A data set on the host.

    name: what it is called in logs.
    train, test: input name -> `[N, ...]` array, and `label: [N]` int32.
    public: disjoint examples of the same form for central pre-training, or None.
    class_names: name of each label.
    image_shape: `(height, width, channels)` of an image, None for text.
    truncated: sentences of train and test that were cut to `max_length` tokens.
    fingerprint: SHA-256 of the arrays and the class names.
    tokenizer_hash: SHA-256 of what decides tokens, as `tokens.tokenizer_hash`; empty for images.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    public: dict[str, np.ndarray] | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    truncated: int
    fingerprint: str
    tokenizer_hash: str = ""


class Source(NamedTuple):
    """Where a run's examples come from: what a method of the slot "data" makes.

    load: `(tokenizer, what names it in the cache of tokens) -> Examples`; None and "" where there is no tokenizer.
    tokenizes: whether it reads sentences, and so needs the tokenizer of the model.
    """

    load: Callable[["PreTrainedTokenizerBase | None", str], Examples]
    tokenizes: bool = False


def make(options: DataConfig, context: Context) -> Source:
    """The source of one of the package's own data sets."""
    del context
    return Source(lambda tokenizer, name: load(options, tokenizer, name), tokenizes=options.source == "tsv")


METHODS = (
    Method("data", "digits", DataConfig, make, needs=frozenset({"image_model"})),
    Method("data", "tsv", DataConfig, make, needs=frozenset({"text_model"})),
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
        one's own may read others. Floats become float32 and integers int32.
      class_names: name of each label, from 0 on.
      public: disjoint examples of the same form for central pre-training, or None.

    Raises:
      ValueError: names the array, what it must be and what it is.
    """
    if not name or name in get_args(SourceName):
        raise ValueError(f"name must be one that no other source has, got {name!r}")
    parts = {"train": train, "test": test} | ({} if public is None else {"public": public})
    checked, names = check_pools(parts, class_names)
    examples = _examples(
        name, checked["train"], checked["test"], names, public=checked.get("public"), image_shape=_image_shape(checked)
    )
    return Method("data", name, _options_of(name), lambda options, context: Source(lambda tokenizer, name: examples))


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
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tokenizer_id: str = "",
    cache_dir: str | PathLike[str] | None = None,
) -> Examples:
    """Reads the examples that `config` names.

    Args:
      config: the choice of data.
      tokenizer: turns sentences into ids; needed for `tsv`.
      tokenizer_id: names the tokenizer in the cache of tokenised sentences, beside what it consists of; without
        a name nothing is cached.
      cache_dir: folder of that cache; by default $FEDJAX_LORA_CACHE, or ~/.cache/fedjax-lora.

    Returns:
      The examples. Images: `image [N, 8, 8, 1]` float32 in [0, 1]. Text: `input_ids [N, max_length]` int32 and
      `attention_mask [N, max_length]` int32, padded on the right.

    Raises:
      ValueError: a file is missing or malformed, the tokenizer is missing, or it can make nothing of a sentence.
    """
    if config.source == "digits":
        return _digits()
    if tokenizer is None:
        raise ValueError(f"source must be digits for a model without a tokenizer, got {config.source!r}")
    return _sentences(config, tokens.Cache(tokenizer, tokenizer_id, cache_dir))


def _examples(
    name: str,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    class_names: tuple[str, ...],
    public: dict[str, np.ndarray] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    truncated: int = 0,
    tokenizer_hash: str = "",
) -> Examples:
    parts = {"train": train, "test": test, "public": public or {}}
    arrays = {f"{part}/{leaf}": value for part, leaves in parts.items() for leaf, value in leaves.items()}
    fingerprint = tokens.digest(arrays, *class_names)
    return Examples(name, train, test, public, class_names, image_shape, truncated, fingerprint, tokenizer_hash)


def _digits() -> Examples:
    """The 1,797 digits of scikit-learn, split once and for all.

    Of each class a fifth is held out for testing; of what is left, 45 % of the classes 0-4 is public. So a model
    that was pre-trained on the public part has yet to learn the classes 5-9.
    """
    from sklearn.datasets import load_digits  # here, since a run on text should not wait for scikit-learn

    images, labels = load_digits(return_X_y=True)
    images = (np.asarray(images).reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = np.asarray(labels).astype(np.int32)

    generator = np.random.default_rng(_DIGITS_SEED)
    rows: dict[str, list[np.ndarray]] = {"test": [], "public": [], "train": []}
    for label in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        num_test = round(_DIGITS_TEST_SHARE * len(shuffled))
        public_share = _DIGITS_PUBLIC_SHARE if label in _DIGITS_PUBLIC_CLASSES else 0.0
        num_public = round(public_share * (len(shuffled) - num_test))
        parts = np.split(shuffled, [num_test, num_test + num_public])
        for part, members in zip(rows, parts, strict=True):
            rows[part].append(members)

    def pool(part: str) -> dict[str, np.ndarray]:
        index = np.sort(np.concatenate(rows[part]))
        return {"image": images[index], "label": labels[index]}

    return _examples(
        "digits",
        pool("train"),
        pool("test"),
        tuple(str(label) for label in range(10)),
        public=pool("public"),
        image_shape=(8, 8, 1),
    )


def _sentences(config: DataConfig, cache: tokens.Cache) -> Examples:
    assert config.train is not None and config.test is not None  # as DataConfig demands of this source
    train, test = tsv.read(config.train, "data.train"), tsv.read(config.test, "data.test")
    class_names = tsv.class_names(train, test)
    ids = {name: label for label, name in enumerate(class_names)}
    pools = []
    truncated = 0
    for table in (train, test):
        result = cache.tokenize(table, config.max_length)
        labels = np.asarray([ids[label] for label in table.labels], np.int32)
        pools.append({**result.arrays, "label": labels})
        truncated += result.truncated
    return _examples("tsv", pools[0], pools[1], class_names, truncated=truncated, tokenizer_hash=cache.tokenizer_hash)
