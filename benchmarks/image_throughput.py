"""Throughput of one federated round of a ViT with LoRA, side by side with a PyTorch + PEFT loop over clients.

Run as `python benchmarks/image_throughput.py --model FOLDER`, of the ViT in a folder as Hugging Face has it, such as
`random_model.py vit-b FOLDER` makes. Images are random. What is compared, and how, is as in `round_throughput.py`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from common import Workload, emit, model_folder
from round_throughput import measured, measuring_arguments


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


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of a ViT")
    parser.add_argument("--clients", type=int, default=4, help="clients of a round (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="local steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    measuring_arguments(parser)
    options = parser.parse_args()
    shape = ImageWorkload.of(model_folder(options.model), options.clients, options.steps, options.batch)
    described: dict[str, Any] = {**vars(shape), "model": Path(shape.model).name}
    emit(measured("image_throughput", shape, described, options), options.out)


if __name__ == "__main__":
    main()
