"""A run as it is opened for export or prediction: a model of a folder with random adapters on all modules."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.adapters import lora
from fedjax_lora.app.trained import TrainedRun
from fedjax_lora.config.assemble import records
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import load_config
from fedjax_lora.core.learning import Model
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.io.run_files import FIELDS
from fedjax_lora.models import load

RANK, MAX_RANK, ALPHA = 3, 4, 4.0

Own = Mapping[tuple[str, int], tuple[int, float]]
"""Module and layer -> its own rank and alpha."""


def trained_run(
    folder: Path, task: str, pooling: str, labels: tuple[str, ...], *overrides: str
) -> tuple[TrainedRun, Model]:
    """The run whose base model is in `folder / "base"`, with a log of one round, and its model."""
    config = load_config(
        None,
        [
            f"model={{pretrained: {folder / 'base'}, pooling: {pooling}}}",
            f"task={task}",
            f"lora={{max_rank: {MAX_RANK}, rank: {RANK}, alpha: {ALPHA}}}",
            "data={source: tsv, train: /gone, test: /gone, max_length: 12}",
            *overrides,
        ],
    )
    found = load.read_pretrained(config.model, config.model.pretrained, config.task.learns)
    context = Context(1, 1, num_classes=len(labels), image_shape=found.shape.image_shape)
    model = records(config, Catalogue.of(), context, ("task", "adapter", "model"))["model"]
    keys = iter(jax.random.split(jax.random.key(1), 50))
    modules = {
        name: Factors(a=f.a, b=0.3 * jax.random.normal(next(keys), f.b.shape))
        for name, f in lora.init(next(keys), model.sites, model.num_layers, MAX_RANK).items()
    }
    head = {name: jax.random.normal(next(keys), leaf.shape) for name, leaf in model.init_head(next(keys)).items()}
    line = dict.fromkeys(FIELDS, 0) | {"round": 1, "tail_energy": []}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    named = () if task in ("regression", "causal_lm") else labels
    adapters, data = Adapters(modules=modules, head=head), {"class_names": list(labels)}
    return TrainedRun(folder, config, data, 1, named, found, found.weights(), {}, adapters, RANK), model


def outputs_of(run: TrainedRun, model: Model, batch, own: Own | None = None) -> jax.Array:
    """What the run's model computes of a batch."""
    modules = {}
    for name, f in run.adapters.modules.items():
        ranks, scales = np.full(len(f.a), RANK), np.full(len(f.a), ALPHA / RANK)
        for (module, layer), (rank, alpha) in (own or {}).items():
            if module == name:
                ranks[layer], scales[layer] = rank, alpha / rank
        mask = np.float32(np.arange(MAX_RANK) < ranks[:, None])
        scaled = np.float32(scales[:, None] * mask)
        modules[name] = Factors(a=f.a * mask[:, None], b=f.b * scaled[..., None])
    used = Adapters(modules=modules, head=run.adapters.head)
    return jax.jit(model.apply)(run.base, used, {name: jnp.asarray(leaf) for name, leaf in batch.items()})
