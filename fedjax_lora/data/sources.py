"""Examples on the host, as NumPy arrays: bundled images of digits, or sentences from a tab-separated file."""

import dataclasses
from os import PathLike
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from fedjax_lora.data import tokens, tsv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = Literal["digits", "tsv"]

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

    source: Source = "digits"
    train: str | None = None
    test: str | None = None
    max_length: int = 64

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        if self.source not in get_args(Source):
            raise ValueError(f"source must be one of {', '.join(get_args(Source))}, got {self.source!r}")
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
