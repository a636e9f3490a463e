"""A run's adapters for other tools."""

from pathlib import Path

import jax

from fedjax_lora.build import build
from fedjax_lora.config import load_config
from fedjax_lora.io import checkpoint, peft
from fedjax_lora.io.log import RunFolder
from fedjax_lora.models.bert import MODULE_NAMES
from fedjax_lora.sim.kept import deployed


def export_run(run: str | Path, folder: str | Path) -> None:
    """Write the adapters of a run's last checkpoint, those that its global accuracy is of, as a PEFT folder.

    Raises:
      ValueError: the run has no checkpoint, its model is none that PEFT knows, or it merged products into the base.
    """
    config = load_config(Path(run) / "config.yaml")
    if config.model.pretrained is None:
        raise ValueError(f"model.pretrained must name a Hugging Face model to export to peft, got null in {run}")
    simulation = build(config)
    like = simulation.init(jax.random.key(config.seed))
    if like.merged:
        raise ValueError(
            f"aggregation.name must be one that leaves the base as it is to export to peft, "
            f"got {config.aggregation.name!r} in {run}"
        )
    found = RunFolder(run).last_checkpoint()
    if found is None:
        raise ValueError(f"{run} must hold a checkpoint to export, got none")
    state = checkpoint.restore(found, like)
    lora, adapters = config.lora, deployed(state.adapters, state.clients)
    peft.export(folder, adapters, MODULE_NAMES, lora.rank, lora.alpha, config.model.pretrained)
