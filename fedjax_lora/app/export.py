"""A run's adapters, or its whole model, for other tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.adapters import lora
from fedjax_lora.app.trained import TrainedRun, open_run
from fedjax_lora.config.beginning import layers_hash
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import Adapters
from fedjax_lora.io import merged, peft
from fedjax_lora.io.model_card import Card
from fedjax_lora.io.run_files import read_metrics
from fedjax_lora.io.summary import OF_TASK
from fedjax_lora.models import load, table

FORMATS = {
    "peft": "a folder for PeftModel, with the adapters alone",
    "merged": "a folder for from_pretrained of transformers, with the whole model",
}
"""Name -> what it is."""


def export_run(
    run: str | Path,
    folder: str | Path,
    methods: Sequence[Method] = (),
    form: str = "peft",
    client: int | None = None,
) -> None:
    """Write what a run has trained, as of its last checkpoint: what its global accuracy is of, or a client's own.

    Where the run has merged products into its frozen weights, adapters hold these too, in the rank that they take.

    Args:
      run: its folder.
      folder: new or empty.
      methods: a user's own that the run was started with.
      form: one of FORMATS.
      client: number of the client whose own adapters are meant; None for the global ones.

    Raises:
      ValueError: as of `open_run`, or the folder is in use.
    """
    if form not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    export(open_run(run, methods, client), folder, form, client)


def export(found: TrainedRun, folder: str | Path, form: str, client: int | None = None) -> None:
    """The same of a run that is open; `client` is the one whose adapters it holds."""
    head = {name: np.asarray(leaf) for name, leaf in found.adapters.head.items()}
    card = _card(found, client)
    if form == "merged":
        merged.export(folder, found.found.folder, _tensors(found, card), head, card)
        return
    rows = found.found.family.weights(found.found.shape)
    adapters, facts = peft.plain(found.adapters, found.rank, found.scale, found.layers), dict(card.facts)
    if found.merged:
        adapters = peft.absorb(adapters, found.merged)
        facts["products that the server merged into the base model"] = "in the adapters, in the rank that they take"
    turned = not table.input_first(rows).isdisjoint(adapters.modules)
    peft.export(folder, found.found.folder, adapters, head, table.sites(rows), card._replace(facts=facts), turned)


def _tensors(found: TrainedRun, card: Card) -> dict[str, np.ndarray]:
    """The whole model's weights, float32, by their names in the class of the card, or in the bare model."""
    rows, of = found.found.family.weights(found.found.shape), card.head_class
    layers, modules = found.layers, found.adapters.modules
    modules = modules if layers is None else layers.scaled(layers.masked(modules))
    mask = lora.rank_mask(found.rank, lora.max_rank(found.adapters))
    used = Adapters(modules=lora.fold(modules, mask, found.scale), head=found.adapters.head)
    base = jax.tree.map(lambda leaf: leaf.astype(np.float32), found.base)
    base = lora.add_to_base(base, jax.tree.map(jnp.asarray, found.merged), table.sites(rows))
    own = table.tensors(rows, lora.merge(base, used, table.sites(rows)))
    beside = {name for row in rows.values() if not row.prefixed for name in row.names}  # a language model's own head
    if of is None or of.head:
        own = {name: tensor for name, tensor in own.items() if name not in beside}
    if of is None:
        return found.found.spare() | own
    return {name if name in beside else f"{of.prefix}{name}": tensor for name, tensor in own.items()}


def _card(found: TrainedRun, client: int | None) -> Card:
    model, family = found.config.model, found.found.family
    assert isinstance(model, load.ModelConfig) and model.pretrained is not None
    return Card(
        base_model=_base_model(model.pretrained),
        weights_hash=layers_hash(model, found.base),
        labels=found.labels,
        pooling=model.pooling,
        pooler="pooler" in found.base,
        head_class=family.head_class(found.config.task.name, found.found.shape),
        facts=_facts(found, client),
    )


def _base_model(pretrained: str) -> str:
    """A folder by its absolute path; a hub id as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained


def _facts(found: TrainedRun, client: int | None) -> dict[str, Any]:
    """What the model card says of the training: settings, and what the log has measured up to the checkpoint."""
    config, lines = found.config, read_metrics(found.folder)[: found.round]
    methods = {
        slot: getattr(config, slot).name for slot in ("task", "training", "aggregation", "sparsifier", "control")
    }
    settings = {
        "rounds": found.round,
        "clients": config.clients.count,
        "clients in a round": config.clients.per_round or config.clients.count,
        "local steps": config.local.steps,
        "learning rate": config.local.optimizer.learning_rate,
        "seed": config.seed,
    }
    sums = {
        "uplink, bits": sum(line["uplink_bits"] for line in lines),
        "downlink, bits": sum(line["downlink_bits"] for line in lines),
        "simulated time, s": lines[-1]["cumulative_latency_s"],
    }
    own = {} if client is None else {"client whose own adapters these are": client}
    measured = _measured(lines[-1]) if client is None else {}  # of the global adapters, not of one client's own
    return {**own, **methods, **settings, **sums, **measured}


def _measured(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the last evaluation has found."""
    found = {
        "accuracy on the held-out examples": line["eval_accuracy"],
        "accuracy of the clients' own adapters, mean": line["personal_accuracy"],
        **{name: value for name, value in line.items() if name.startswith(OF_TASK)},
    }
    return {name: value for name, value in found.items() if value is not None}
