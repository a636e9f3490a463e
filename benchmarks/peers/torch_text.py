"""One client's training of a BERT with LoRA by PEFT, for peers that move vectors: as `torch_digits`, on sentences."""

from typing import Literal

import numpy as np
import torch
from common import LEARNING_RATE, PeerSettings
from peer import Classifier, quiet
from torch import nn
from torch_digits import Round, optimizer, trained

ATTENTION: Literal["sdpa"] = "sdpa"
"""The faster of the two in most of our runs of `round_throughput.py`."""


class Trainer:
    """One client after the other, in one process that keeps the data and the model; batches are padded dynamically.

    shape: its `data` is a file of NumPy with `input_ids` and `attention_mask` `[N, S]`, `label` `[N]` and the folder of
      the `model`.
    """

    def __init__(self, shape: Round):
        quiet()
        with np.load(shape.data) as pool:
            self._input_ids, self._mask, self._labels = (
                torch.from_numpy(pool[name]).long() for name in ("input_ids", "attention_mask", "label")
            )
            folder = str(pool["model"])
        self._shape = shape
        self._model = shape.prepare(lambda: Classifier(folder, 2, PeerSettings(ATTENTION, "float32", False)).train())
        self._trained = trained(self._model)

    def vector(self) -> np.ndarray:
        """The trained parameters as one vector: the first global ones, until a client is trained."""
        return nn.utils.parameters_to_vector(self._trained).detach().numpy()

    def train(self, start: np.ndarray, client: int) -> tuple[np.ndarray, float]:
        """The vector that a client ends with, and its mean loss."""
        nn.utils.vector_to_parameters(torch.tensor(start), self._trained)
        steps = optimizer(self._trained, LEARNING_RATE)
        total = torch.zeros(())
        for rows in self._shape.rows(client).split(self._shape.batch):
            longest = int(self._mask[rows].sum(1).max())
            logits = self._model(self._input_ids[rows, :longest], self._mask[rows, :longest])
            loss = nn.functional.cross_entropy(logits, self._labels[rows])
            steps.zero_grad()
            loss.backward()
            steps.step()
            total += loss.detach()
        return self.vector(), float(total) / self._shape.steps
