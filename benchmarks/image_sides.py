"""Both sides of `image_throughput.py`: the engine and the peer of `round_throughput.py`, on images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PeerSettings
from engine import Engine
from image_workload import ImageWorkload
from peer import Peer, adapted
from torch import nn
from transformers import ViTModel

from fedjax_lora.core.methods import Method
from fedjax_lora.data.sources import arrays

TARGETS = ("q_proj", "v_proj")


class ImageEngine(Engine):
    """This project's side."""

    def _data(self, folder: Path) -> tuple[Any, Sequence[Method]]:
        assert isinstance(self._workload, ImageWorkload)
        train, test = self._workload.pools(folder)
        source = arrays("random", train=train, test=test, class_names=("no", "yes"))
        return source.options(), (source,)

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Images `[N, H, W, C]`, and ones for their positions `[N, length]`."""
        image = np.asarray(self._simulation.world.data.train["image"])
        return image, np.ones((len(image), self._workload.length), np.int32)


class ImageClassifier(nn.Module):
    """A ViT with adapters, its mean over all positions, and a linear head."""

    def __init__(self, folder: str, num_classes: int, settings: PeerSettings):
        super().__init__()
        vit = ViTModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation=settings.attention)
        self.encoder = adapted(vit, TARGETS, settings)
        self.head = nn.Linear(vit.config.hidden_size, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, classes]` logits."""
        return self.head(self.encoder(pixel_values=image).last_hidden_state.mean(1))


class ImagePeer(Peer):
    """The peer's side."""

    def _made(self) -> nn.Module:
        return ImageClassifier(self._workload.model, 2, self._settings)

    def _hold(self, tokens: tuple[np.ndarray, np.ndarray]) -> None:
        self._image = torch.tensor(tokens[0], device=self._device).permute(0, 3, 1, 2).contiguous()

    def _inputs(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self._image[batch],)
