"""A run's adapters for other tools, from the run's folder and its base model: no data are read, nothing is compiled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_lora.config.assemble import hash_weights
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import Base
from fedjax_lora.data import tokens
from fedjax_lora.io import checkpoint, peft
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import check_config, read_data, read_metrics
from fedjax_lora.models import load, table
from fedjax_lora.training.personal import deployed


def export_run(run: str | Path, folder: str | Path, methods: Sequence[Method] = ()) -> None:
    """Write the adapters of a run's last checkpoint, those that its global accuracy is of, as a PEFT folder.

    Where the run has merged products into its frozen weights, the adapters hold these too, in the rank that they take.

    Args:
      run: its folder.
      folder: new or empty.
      methods: a user's own that the run was started with.

    Raises:
      ValueError: the run has no readable checkpoint or does not name its classes, its model is none that PEFT knows or
        another than it was, what it trained is not finite, or the folder is in use.
    """
    check_config(run)
    config, data = load_config(Path(run) / "config.yaml", methods=methods), read_data(run)
    model = config.model
    if not isinstance(model, load.ModelConfig) or model.pretrained is None:
        raise ValueError(f"model.pretrained must name a Hugging Face model to export to peft, got null in {run}")
    checkpointed = RunFolder(run).last_checkpoint()
    if checkpointed is None:
        raise ValueError(f"{run} must hold a checkpoint to export, got none that is whole")
    trained = checkpoint.restore_trained(checkpointed)
    adapters = deployed(trained.adapters, trained.clients)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((adapters, trained.merged))):
        raise ValueError(
            f"{run} must have trained finite adapters to export, got NaN or infinity in round {trained.round}"
        )
    if "w" not in adapters.head:
        raise ValueError(f"task.name must be of a task that trains a head to export to peft, got {config.task.name!r}")
    labels = _labels(data, adapters.head["w"].shape[-1], run)
    found, base = _unchanged_base(model, data, run)

    rank, alpha = config.lora.rank, config.lora.alpha
    card = peft.Card(
        base_model=_base_model(model.pretrained),
        labels=labels,
        pooling=model.pooling,
        pooler="pooler" in base,
        facts=_facts(config, trained.round, run),
    )
    if trained.merged:
        adapters, rank = peft.absorb(adapters, trained.merged, rank, alpha)
        alpha = float(rank)  # a scale of 1
    peft.export(folder, adapters, table.sites(found.family.weights(found.shape)), rank, alpha, card)


def _labels(data: dict[str, Any], columns: int, run: str | Path) -> list[str]:
    """The label of each of the head's columns."""
    labels = data.get("class_names")
    if not (isinstance(labels, list) and len(labels) == columns and all(isinstance(label, str) for label in labels)):
        raise ValueError(
            f"class_names in data.json of {run} must be a list of {columns} labels, one for each column of the head, "
            f"got {labels!r}"
        )
    return labels


def _unchanged_base(model: load.ModelConfig, data: dict[str, Any], run: str | Path) -> tuple[load.Pretrained, Base]:
    """The base model's shape and weights; refuses a model that is not the one that the adapters were trained on."""
    assert model.pretrained is not None
    found = load.read_pretrained(model, model.pretrained)
    base = found.weights()
    now = {
        "model_config_hash": ("config.json", load.model_config_hash(model)),
        "tokenizer_hash": ("tokenizer", tokens.tokenizer_hash(load.load_tokenizer(model.pretrained))),
        "base_hash": ("weights", hash_weights(base)),
    }
    for key, (what, is_now) in now.items():
        if data.get(key) != is_now:
            raise ValueError(
                f"model.pretrained must hold the {what} that {run} was started with ({key} {data.get(key)}), "
                f"got others ({is_now}) in {model.pretrained}"
            )
    return found, base


def _base_model(pretrained: str) -> str:
    """A folder by its absolute path; a hub id as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained


def _facts(config: ExperimentConfig, rounds: int, run: str | Path) -> dict[str, Any]:
    """What the model card says of the training."""
    method = {section: getattr(config, section).name for section in ("aggregation", "sparsifier", "control")}
    accuracy = read_metrics(run)[rounds - 1]["eval_accuracy"]
    facts = {**method, "rounds": rounds, "clients": config.clients.count}
    return facts if accuracy is None else {**facts, "accuracy on the held-out examples": accuracy}
