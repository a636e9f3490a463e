"""What a run has learned, applied to new texts or images; its data are not read."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.adapters import lora
from fedjax_lora.app.trained import TrainedRun, open_run
from fedjax_lora.config.assemble import records
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.core.learning import Learned
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.data import encode, images, readers, sources, tables
from fedjax_lora.data.tables import Table
from fedjax_lora.data.tokens import Cache
from fedjax_lora.models import load

FIELD = "FILE"

_BATCH = 64


class Predictions(NamedTuple):
    """What a model says of texts, or of images.

    inputs: the columns that it read, by their roles; of images their paths, as `image`.
    labels: one of each input, or one of each of a text's words; None where the task has none.
    values: of each label the probability; of a number the number itself; of a text that is continued the perplexity of
      its tokens, or of its response's. None stands for a word that was cut or has no token, and for no token at all.
    measure: `probability`, `value` or `perplexity`.
    notes: what a user should know of how the texts were read, each in one line.
    """

    inputs: Table
    labels: list[Any] | None
    values: list[Any]
    measure: str = "probability"
    notes: tuple[str, ...] = ()

    def lines(self, as_json: bool = False) -> Iterator[str]:
        """A line of each input: label and value between tabs, and an image's path; or a JSON object.

        `-` or null stands for None.
        """
        for row, value in enumerate(self.values):
            label = {} if self.labels is None else {"label": self.labels[row]}
            read = {role: column[row] for role, column in self.inputs.columns.items()}
            if as_json:
                yield json.dumps({**read, **label, self.measure: value}, ensure_ascii=False)
            else:
                parts = *label.values(), value, *([read["image"]] if "image" in read else [])
                yield "\t".join(" ".join(map(_shown, _listed(part))) for part in parts)


def _listed(part: Any) -> list[Any]:
    return part if isinstance(part, list) else [part]


def _shown(part: Any) -> str:
    return "-" if part is None else str(part)


def predict_run(run: str | Path, path: str, methods: Sequence[Method] = (), client: int | None = None) -> Predictions:
    """Predictions for the texts of a file, or for images.

    Args:
      run: folder of the run.
      path: of a file with a text in each line; of a `.csv`, `.tsv`, `.jsonl` or `.parquet` file with the columns that
        the training data had, but for the label, or, of a run on `sentence<TAB>label` lines, such lines in a `.tsv`
        file; or `-` for lines of the standard input. Of a run on images, an image or a folder of images.
      methods: a user's own that the run was started with.
      client: number of the client whose own adapters are meant; None for the global ones.

    Raises:
      ValueError: as of `open_run`, or the file cannot be read or holds no text.
    """
    return predict(open_run(run, methods, client), path, methods)


def predict(found: TrainedRun, path: str, methods: Sequence[Method] = ()) -> Predictions:
    """The same of a run that is open."""
    if found.found.shape.image_shape is not None:
        return _predict_images(found, path, methods)
    learns: Learned = getattr(found.config.task, "learns", "label")
    data: Any = found.config.data
    if not hasattr(data, "max_length"):
        raise ValueError(f"data.source must be one that reads texts to predict, got {data.source!r} in {found.folder}")
    texts = _read(path, data, found.data.get("columns") or sources.columns_of(data).given(), learns)
    model: Any = found.config.model
    cache = Cache(load.load_tokenizer(model.pretrained), "")
    tokens = encode.inputs(texts, learns, cache, data.max_length, getattr(data, "template", "instruction"))
    arrays, cut = dict(tokens.arrays), tokens.truncated
    notes = (f"{cut} texts were cut to data.max_length = {data.max_length} tokens",) if cut else ()
    word = arrays.pop("word", None)
    outputs = _outputs(found, arrays, Catalogue.of(methods), scored=learns == "next_token")
    if learns == "next_token":
        return Predictions(texts, None, _perplexities(outputs), "perplexity", notes)
    if learns == "number":
        return Predictions(texts, None, [float(value) for value in outputs], "value", notes)
    best, likely = _likeliest(outputs)
    if word is None:
        return Predictions(texts, [found.labels[i] for i in best], likely.tolist(), notes=notes)
    counts = [len(words) for words in encode.words_of(texts)]
    labels = [[None if i is None else found.labels[i] for i in row] for row in _of_words(best, word, counts)]
    return Predictions(texts, labels, _of_words(likely, word, counts), notes=notes)


def _predict_images(found: TrainedRun, path: str, methods: Sequence[Method]) -> Predictions:
    """The labels of an image, or of those of a folder."""
    data: Any = found.config.data
    if not hasattr(data, "image_size"):
        raise ValueError(
            f"data.source must be one that reads files of images to predict, got {data.source!r} in {found.folder}"
        )
    table = images.inputs(path, FIELD)
    image = images.pixels(table, data.image_size, data.channels)
    best, likely = _likeliest(_outputs(found, {"image": image}, Catalogue.of(methods)))
    return Predictions(table, [found.labels[i] for i in best], likely.tolist())


def _perplexities(scores: Mapping[str, np.ndarray]) -> list[float | None]:
    """Of each text by its tokens that are learned; None where there is none."""
    pairs = zip(scores["loss"].tolist(), scores["positions"].tolist(), strict=True)
    return [float(np.exp(loss / positions)) if positions else None for loss, positions in pairs]


def _of_words(values: np.ndarray, word: np.ndarray, counts: Sequence[int]) -> list[list[Any]]:
    """The value of each of a text's words, of `[N, S]` at the positions where they begin; None where one has none."""
    found: list[list[Any]] = [[None] * count for count in counts]
    for own, row, numbers in zip(found, values.tolist(), word.tolist(), strict=True):
        for value, number in zip(row, numbers, strict=False):  # beyond the longest text there are no values
            if number >= 0:
                own[number] = value
    return found


def _read(path: str, data: Any, named: Mapping[str, str], learns: Learned) -> Table:
    """What the model reads of a file, by roles: its columns, or its lines as texts.

    `named` is role -> column of the training data, as far as it is known.
    """
    table = None if path == "-" else sources.inputs(data, path, FIELD)
    if table is not None:
        return tables.by_role(table, tables.find_inputs(table, named, learns))
    for both, why in ((("text", "text_pair"), "compares"), (("prompt", "response"), "has learned")):
        if both[1] in named:
            pair = " and ".join(named.get(role, role) for role in both)
            raise ValueError(f"{FIELD} must have the columns {pair}, which the run {why}, got lines of text in {path}")
    content = sys.stdin.read() if path == "-" else readers.read_text(path, FIELD)
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{FIELD} must hold at least one text, got none in {path}")
    role, texts = "words" if learns == "token_label" else "text", [line for _, line in lines]
    return Table(f"{FIELD} {path}", {role: texts}, [number for number, _ in lines])


def _likeliest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[...]` the column of the largest of `[..., classes]` logits, and its probability."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return logits.argmax(-1), shifted.max(-1) / shifted.sum(-1)


def _outputs(found: TrainedRun, arrays: dict[str, np.ndarray], catalogue: Catalogue, scored: bool = False) -> Any:
    """`[N, ...]` outputs of the task, or `[N]` scores by their names, a batch at a time, as wide as the longest."""
    context = Context(1, 1, num_classes=len(found.data["class_names"]), image_shape=found.found.shape.image_shape)
    made = records(found.config, catalogue, context, ("task", "adapter", "model"))
    mask = lora.rank_mask(found.rank, lora.max_rank(found.adapters))
    modules = made["adapter"].effective(found.adapters.modules, mask, found.scale)
    used = Adapters(modules=modules, head=jax.tree.map(jnp.asarray, found.adapters.head))
    base = lora.add_to_base(found.base, jax.tree.map(jnp.asarray, found.merged), made["model"].sites)
    if "attention_mask" in arrays:
        width = int(arrays["attention_mask"].sum(1).max())
        arrays = {name: leaf[:, :width] for name, leaf in arrays.items()}

    @jax.jit
    def compute(base: Base, used: Adapters, batch: Batch) -> Any:
        outputs = made["model"].apply(base, used, batch)
        return made["task"].score(outputs, batch) if scored else outputs

    parts, number = [], len(next(iter(arrays.values())))
    for first in range(0, number, _BATCH):
        rows = np.arange(first, first + min(_BATCH, number)) % number  # the last batch begins anew: one shape for all
        batch = {name: jnp.asarray(leaf[rows]) for name, leaf in arrays.items()}
        parts.append(jax.device_get(compute(base, used, batch)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *parts)
