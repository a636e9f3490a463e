"""Labels of new texts, by what a run has trained; its data are not read."""

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
from fedjax_lora.core.types import Adapters
from fedjax_lora.data import encode, readers, sources, tables
from fedjax_lora.data.tables import Table
from fedjax_lora.data.tokens import Cache
from fedjax_lora.models import load

FIELD = "FILE"

_BATCH = 64


class Predictions(NamedTuple):
    """What a model says of texts.

    texts: the columns that it read, by their roles.
    labels, probabilities: one of each text, or one of each of its words, None for a word that was cut or has no token;
      where the task is a number, there are no labels, and the second is called `value`.
    notes: what a user should know of how the texts were read, each in one line.
    """

    texts: Table
    labels: list[Any] | None
    probabilities: list[Any]
    notes: tuple[str, ...] = ()

    def lines(self, as_json: bool = False) -> Iterator[str]:
        """A line of each text: label and probability between tabs, or a JSON object; `-` or null stands for None."""
        named = "value" if self.labels is None else "probability"
        for row, value in enumerate(self.probabilities):
            label = {} if self.labels is None else {"label": self.labels[row]}
            if as_json:
                texts = {role: column[row] for role, column in self.texts.columns.items()}
                yield json.dumps({**texts, **label, named: value}, ensure_ascii=False)
            else:
                yield "\t".join(" ".join(map(_shown, _listed(part))) for part in (*label.values(), value))


def _listed(part: Any) -> list[Any]:
    return part if isinstance(part, list) else [part]


def _shown(part: Any) -> str:
    return "-" if part is None else str(part)


def predict_run(run: str | Path, path: str, methods: Sequence[Method] = (), client: int | None = None) -> Predictions:
    """Predictions for the texts of a file.

    Args:
      run: folder of the run.
      path: of a file with a text in each line; of a `.csv`, `.tsv`, `.jsonl` or `.parquet` file with the columns that
        the training data had, but for the label, or, of a run on `sentence<TAB>label` lines, such lines in a `.tsv`
        file; or `-` for lines of the standard input.
      methods: a user's own that the run was started with.
      client: number of the client whose own adapters are meant; None for the global ones.

    Raises:
      ValueError: as of `open_run`, or the file cannot be read or holds no text.
    """
    return predict(open_run(run, methods, client), path, methods)


def predict(found: TrainedRun, path: str, methods: Sequence[Method] = ()) -> Predictions:
    """The same of a run that is open."""
    learns: Learned = getattr(found.config.task, "learns", "label")
    data: Any = found.config.data
    if found.found.shape.image_shape is not None:
        raise ValueError(f"{found.folder} must be of a model of text to predict, got one of images")
    if learns == "next_token":
        raise ValueError(f"task.name must be one with labels or numbers to predict, got {found.config.task.name!r}")
    if not hasattr(data, "max_length"):
        raise ValueError(f"data.source must be one that reads texts to predict, got {data.source!r} in {found.folder}")
    texts = _read(path, data, found.data.get("columns") or sources.columns_of(data).given(), learns)
    model: Any = found.config.model
    cache = Cache(load.load_tokenizer(model.pretrained), "")
    tokens = encode.inputs(texts, learns, cache, data.max_length)
    arrays, cut = dict(tokens.arrays), tokens.truncated
    notes = (f"{cut} texts were cut to data.max_length = {data.max_length} tokens",) if cut else ()
    word = arrays.pop("word", None)
    outputs = _outputs(found, arrays, Catalogue.of(methods))
    if learns == "number":
        return Predictions(texts, None, [float(value) for value in outputs], notes)
    best, likely = _likeliest(outputs)
    if word is None:
        return Predictions(texts, [found.labels[i] for i in best], likely.tolist(), notes)
    counts = [len(words) for words in encode.words_of(texts)]
    labels = [[None if i is None else found.labels[i] for i in row] for row in _of_words(best, word, counts)]
    return Predictions(texts, labels, _of_words(likely, word, counts), notes)


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
    if "text_pair" in named:
        pair = " and ".join(named.get(role, role) for role in ("text", "text_pair"))
        raise ValueError(f"{FIELD} must have the columns {pair}, which the run compares, got lines of text in {path}")
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


def _outputs(found: TrainedRun, arrays: dict[str, np.ndarray], catalogue: Catalogue) -> np.ndarray:
    """`[N, ...]` outputs of the task, a batch at a time, in the width of the longest text."""
    context = Context(1, 1, num_classes=len(found.data["class_names"]))
    made = records(found.config, catalogue, context, ("task", "adapter", "model"))
    mask = lora.rank_mask(found.rank, lora.max_rank(found.adapters))
    modules = made["adapter"].effective(found.adapters.modules, mask, found.scale)
    used = Adapters(modules=modules, head=jax.tree.map(jnp.asarray, found.adapters.head))
    base = lora.add_to_base(found.base, jax.tree.map(jnp.asarray, found.merged), made["model"].sites)
    apply, width = jax.jit(made["model"].apply), int(arrays["attention_mask"].sum(1).max())
    outputs, number = [], len(arrays["input_ids"])
    for first in range(0, number, _BATCH):
        rows = np.arange(first, first + min(_BATCH, number)) % number  # the last batch begins anew: one shape for all
        batch = {name: jnp.asarray(leaf[rows, :width]) for name, leaf in arrays.items()}
        outputs.append(np.asarray(apply(base, used, batch)))
    return np.concatenate(outputs)[:number]
