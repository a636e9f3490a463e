"""A round on images, for both sides of `image_throughput.py`."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
from common import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageWorkload(Workload):
    """One round of federated LoRA on images; `length` is that of the patches and the learned position before them."""

    engine: ClassVar[str] = "image_sides:ImageEngine"
    peer: ClassVar[str] = "image_sides:ImagePeer"

    @classmethod
    def of(cls, model: str, clients: int, steps: int, batch: int) -> "ImageWorkload":
        """The workload of a folder's model."""
        fields = json.loads((Path(model) / "config.json").read_text())
        length = 1 + (fields["image_size"] // fields["patch_size"]) ** 2
        return cls(model=model, length=length, clients=clients, steps=steps, batch=batch)

    def write(self, folder: Path) -> None:
        """Puts the images of the round, and two to evaluate on, into the folder."""
        fields = json.loads((Path(self.model) / "config.json").read_text())
        side, channels = fields["image_size"], fields["num_channels"]
        drawn = np.random.default_rng(0).random((self.samples + 2, side, side, channels), np.float32)
        np.savez(folder / "images.npz", image=drawn, label=np.arange(self.samples + 2) % 2)

    def pools(self, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What `write` has written: of the round, and to evaluate on."""
        with np.load(folder / "images.npz") as held:
            pool = dict(held)
        return {k: v[: self.samples] for k, v in pool.items()}, {k: v[self.samples :] for k, v in pool.items()}
