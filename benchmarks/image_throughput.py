"""Throughput of one federated round of a ViT with LoRA, side by side with a PyTorch + PEFT loop over clients.

Run as `python benchmarks/image_throughput.py --model FOLDER`, of the ViT in a folder as Hugging Face has it, such as
`random_model.py vit-b FOLDER` makes. Images are random. What is compared, and how, is as in `round_throughput.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from common import emit, model_folder
from image_workload import ImageWorkload
from round_throughput import measured, measuring_arguments


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
