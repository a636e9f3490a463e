"""The model of a run, from its folder and its base model: no data are read, nothing is compiled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.adapters import layer_ranks
from fedjax_lora.adapters.layer_ranks import LayerRanks
from fedjax_lora.config.beginning import column_labels, hash_weights
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.core.learning import Learned
from fedjax_lora.core.methods import Method
from fedjax_lora.core.types import Adapters, Base, ClientState
from fedjax_lora.data import tokens
from fedjax_lora.io import checkpoint
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import CONFIG, check_config, read_data
from fedjax_lora.models import load, table
from fedjax_lora.training.personal import compose, deployed


class TrainedRun(NamedTuple):
    """What a run has trained, as of its newest checkpoint.

    folder, config: of the run. data: its `data.json`. round: of the checkpoint.
    labels: of the head's columns; () where columns have none.
    found, base: the model that the run was started with, and its frozen weights.
    merged: module name -> `[L, n_in, n_out]`, which the server has added to them; `{}` for none.
    adapters: those that the run's global accuracy is of, or a client's own. rank: components of them in use.
    """

    folder: Path
    config: ExperimentConfig
    data: dict[str, Any]
    round: int
    labels: tuple[str, ...]
    found: load.Pretrained
    base: Base
    merged: dict[str, np.ndarray]
    adapters: Adapters
    rank: int

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.config.lora.alpha / self.config.lora.rank

    @property
    def layers(self) -> LayerRanks | None:
        """Ranks and scales of the layers, where they differ."""
        return _layers(self.config, self.found, self.adapters)


def open_run(run: str | Path, methods: Sequence[Method] = (), client: int | None = None) -> TrainedRun:
    """The model of a run's newest checkpoint.

    Args:
      run: its folder.
      methods: a user's own that the run was started with.
      client: number of the client whose own adapters are meant; None for those of the run's global accuracy.

    Raises:
      ValueError: the run has no readable checkpoint or does not name its classes, its model is no pretrained one or
        another than it was, what it trained is not finite, or there is no such client or it keeps nothing of its own.
    """
    check_config(run)
    config, data = load_config(Path(run) / CONFIG, methods=methods), read_data(run)
    model = config.model
    if not isinstance(model, load.ModelConfig) or model.pretrained is None:
        raise ValueError(f"model.pretrained must name a Hugging Face model to use it elsewhere, got null in {run}")
    checkpointed = RunFolder(run).last_checkpoint()
    if checkpointed is None:
        raise ValueError(f"{run} must hold a checkpoint, got none that is whole")
    trained = checkpoint.restore_trained(checkpointed)
    adapters, rank = deployed(trained.adapters, trained.clients), None
    if client is not None:
        adapters, rank = _own(trained, client, run)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((adapters, trained.merged))):
        raise ValueError(f"{run} must have trained finite adapters, got NaN or infinity in round {trained.round}")
    labels = _labels(config, data, adapters.head, run)
    found, base = _unchanged_base(model, getattr(config.task, "learns", "label"), data, run)
    if rank is None:
        rank = int(layer_ranks.structural_rank(_layers(config, found, adapters), config.lora.rank))
    return TrainedRun(Path(run), config, data, trained.round, labels, found, base, trained.merged, adapters, rank)


def _layers(config: ExperimentConfig, found: load.Pretrained, adapters: Adapters) -> LayerRanks | None:
    sites = table.sites(found.family.weights(found.shape))
    own = {name: sites[name] for name in adapters.modules}
    return layer_ranks.resolve(config.lora, own, next(iter(adapters.modules.values())).a.shape[0])


def _own(trained: checkpoint.Trained, client: int, run: str | Path) -> tuple[Adapters, int]:
    """A client's own adapters, and its rank."""
    clients: ClientState = trained.clients
    count = len(clients.rank)
    if not 0 <= client < count:
        raise ValueError(f"--client must be from 0 to {count - 1}, the clients of {run}, got {client}")
    if not clients.personal and np.ptp(clients.rank) == 0:
        raise ValueError(f"--client must be absent for {run}, whose clients keep nothing of their own, got {client}")
    own = jax.tree.map(lambda leaf: jnp.asarray(leaf[client]), clients.personal)
    return compose(trained.adapters, own), int(clients.rank[client])


def _labels(config: ExperimentConfig, data: dict[str, Any], head: dict[str, Any], run: str | Path) -> tuple[str, ...]:
    """The label of each of the head's columns; () where they have none."""
    labels = data.get("class_names")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"class_names in data.json of {run} must be a list of labels, got {labels!r}")
    labels = column_labels(config, labels)
    if labels and len(labels) != head["w"].shape[-1]:
        raise ValueError(
            f"class_names in data.json of {run} must be a list of {head['w'].shape[-1]} labels, one for each column of "
            f"the head, got {list(labels)!r}"
        )
    return labels


def _unchanged_base(
    model: load.ModelConfig, learns: Learned, data: dict[str, Any], run: str | Path
) -> tuple[load.Pretrained, Base]:
    """The base model's shape and weights; refuses a model that is not the one that the adapters were trained on."""
    assert model.pretrained is not None
    found = load.read_pretrained(model, model.pretrained, learns)
    base = found.weights()
    now = {
        "model_config_hash": ("config.json", load.model_config_hash(model)),
        "tokenizer_hash": ("tokenizer", _tokenizer_hash(model.pretrained) if data.get("tokenizer_hash") else ""),
        "base_hash": ("weights", hash_weights(base)),
    }
    for key, (what, is_now) in now.items():
        if data.get(key) != is_now:
            raise ValueError(
                f"model.pretrained must hold the {what} that {run} was started with ({key} {data.get(key)}), "
                f"got others ({is_now}) in {model.pretrained}"
            )
    return found, base


def _tokenizer_hash(pretrained: str) -> str:
    return tokens.tokenizer_hash(load.load_tokenizer(pretrained))
