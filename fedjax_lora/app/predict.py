"""Labels of new texts, by what a run has trained; its data are not read."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.adapters import lora
from fedjax_lora.app.trained import TrainedRun, open_run
from fedjax_lora.config.assemble import records
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.types import Adapters, Learns
from fedjax_lora.data import encode, readers, sources, tables
from fedjax_lora.data.tables import Table
from fedjax_lora.data.tokens import Cache
from fedjax_lora.models import load

FIELD = "FILE"

_BATCH = 64


class Predictions(NamedTuple):
    """What a model says of texts.

    texts: the columns that it read, by their roles.
    labels, probabilities: one of each text, or one of each of its words; where the task is a number, there are no
      labels, and the second is called `value`.
    """

    texts: Table
    labels: list[Any] | None
    probabilities: list[Any]

    def lines(self, as_json: bool = False) -> Iterator[str]:
        """A line of each text: label and probability between tabs, or a JSON object."""
        named = "value" if self.labels is None else "probability"
        for row, value in enumerate(self.probabilities):
            label = {} if self.labels is None else {"label": self.labels[row]}
            if as_json:
                texts = {role: column[row] for role, column in self.texts.columns.items()}
                yield json.dumps({**texts, **label, named: value}, ensure_ascii=False)
            else:
                yield "\t".join(" ".join(map(str, _listed(part))) for part in (*label.values(), value))


def _listed(part: Any) -> list[Any]:
    return part if isinstance(part, list) else [part]


def predict_run(run: str | Path, path: str, methods: Sequence[Method] = (), client: int | None = None) -> Predictions:
    """Predictions for the texts of a file.

    Args:
      run: folder of the run.
      path: of a file with a text in each line; of a `.csv`, `.tsv`, `.jsonl` or `.parquet` file with the columns that
        the training data had, but for the label; or `-` for lines of the standard input.
      methods: a user's own that the run was started with.
      client: number of the client whose own adapters are meant; None for the global ones.

    Raises:
      ValueError: as of `open_run`, or the file cannot be read or holds no text.
    """
    return predict(open_run(run, methods, client), path, methods)


def predict(found: TrainedRun, path: str, methods: Sequence[Method] = ()) -> Predictions:
    """The same of a run that is open."""
    learns: Learns = getattr(found.config.task, "learns", "label")
    data: Any = found.config.data
    if found.found.shape.image_shape is not None:
        raise ValueError(f"{found.folder} must be of a model of text to predict, got one of images")
    if learns == "next_token":
        raise ValueError(f"task.name must be one with labels or numbers to predict, got {found.config.task.name!r}")
    whole = _read(path)
    texts = tables.by_role(whole, tables.find_inputs(whole, sources.columns_of(data), learns))
    model: Any = found.config.model
    cache = Cache(load.load_tokenizer(model.pretrained), "")
    arrays = dict(encode.inputs(texts, learns, cache, data.max_length).arrays)
    word = arrays.pop("word", None)
    outputs = _outputs(found, arrays, Catalogue.of(methods))
    if learns == "number":
        return Predictions(texts, None, [float(value) for value in outputs])
    best, likely = _likeliest(outputs)
    if word is None:
        return Predictions(texts, [found.labels[i] for i in best], likely.tolist())
    begins = word[:, : outputs.shape[1]] >= 0
    labels = [[found.labels[i] for i in row[own]] for row, own in zip(best, begins, strict=True)]
    return Predictions(texts, labels, [row[own].tolist() for row, own in zip(likely, begins, strict=True)])


def _read(path: str) -> Table:
    """The columns of a file, or its lines as texts."""
    table = None if path == "-" else readers.by_suffix(path, FIELD)
    if table is not None:
        return table
    content = sys.stdin.read() if path == "-" else readers.read_text(path, FIELD)
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{FIELD} must hold at least one text, got none in {path}")
    return Table(f"{FIELD} {path}", {"text": [line for _, line in lines]}, [number for number, _ in lines])


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
