"""The peer's side: PyTorch + PEFT, a loop over clients, as tuned as we know how.

The model, the batches and the arithmetic are the engine's: mean pooling over BERT, a linear head, AdamW on factors
and head, no dropout, fresh optimizer state for every client, a plain average of what the clients end with.
"""

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import (
    ALPHA,
    LEARNING_RATE,
    MATMUL_SIZE,
    RANK,
    TARGETS,
    Dtype,
    PeerSettings,
    Workload,
    peak_memory_bytes,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel
from transformers.utils import logging


def quiet() -> None:
    """Leave out advice of the libraries to each other, and of the compiler."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


class Classifier(nn.Module):
    """BERT with adapters, mean pooling over real positions, and a linear head."""

    def __init__(self, folder: str, num_classes: int, settings: PeerSettings):
        super().__init__()
        bert = BertModel.from_pretrained(
            folder,
            add_pooling_layer=False,
            attn_implementation=settings.attention,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        lora = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(TARGETS), lora_dropout=0.0)
        self.encoder = get_peft_model(bert, lora)
        self.head = nn.Linear(bert.config.hidden_size, num_classes)
        if settings.frozen == "bfloat16":
            for name, module in self.encoder.named_modules():
                if isinstance(module, nn.Linear) and "lora_" not in name:
                    module.to(torch.bfloat16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, classes]` logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))


class Peer:
    """The model and its data; `start` sets global adapters, `round` trains all clients once.

    Args:
      workload: what a round computes.
      dtype: of the matrix products; bfloat16 is autocast.
      settings: what tuning found best, or is trying.
      device: of PyTorch.
    """

    def __init__(self, workload: Workload, dtype: Dtype, settings: PeerSettings, device: str = "cpu"):
        started = time.perf_counter()
        quiet()
        torch.set_num_threads(workload.threads)
        torch.manual_seed(0)
        self._workload = workload
        self._dtype = dtype
        self._settings = settings
        self._device = device
        self._model = Classifier(workload.model, 2, settings).to(device).train()
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._logits: Callable[..., torch.Tensor] = (
            torch.compile(self._model, dynamic=workload.text is not None) if settings.compile else self._model
        )
        self._setup_s = time.perf_counter() - started

    def start(
        self, adapters: dict[str, np.ndarray], tokens: tuple[np.ndarray, np.ndarray], labels: np.ndarray
    ) -> float:
        """Begin from the engine's global adapters and pool; returns seconds until the program is compiled."""
        self._global = {
            name: torch.tensor(np.ascontiguousarray(_pick(adapters, name).T), device=self._device)
            for name in self._trained
        }
        self._input_ids, self._mask = (torch.tensor(x, dtype=torch.long, device=self._device) for x in tokens)
        self._labels = torch.tensor(labels, dtype=torch.long, device=self._device)
        started = time.perf_counter()
        self._train_client(np.zeros((1, self._workload.batch), np.int64))
        return time.perf_counter() - started

    def round(self, rows: np.ndarray) -> tuple[float, float]:
        """Seconds that one round took, and its training loss. `rows: [clients, steps, batch]`."""
        started = time.perf_counter()
        total = {name: torch.zeros_like(p) for name, p in self._trained.items()}
        losses = []
        for client_rows in rows:
            losses.append(self._train_client(client_rows))
            for name, p in self._trained.items():
                total[name] += p.detach()
        self._global = {name: value / len(rows) for name, value in total.items()}
        return time.perf_counter() - started, sum(losses) / len(losses)

    def adapters_distance(self, adapters: dict[str, np.ndarray]) -> float:
        """Relative Euclidean distance of the global adapters from the engine's."""
        apart = size = 0.0
        for name, value in self._global.items():
            theirs = _pick(adapters, name).T
            apart += float(np.sum((value.cpu().numpy() - theirs) ** 2))
            size += float(np.sum(theirs**2))
        return (apart / size) ** 0.5

    def describe(self) -> dict[str, Any]:
        """Settings, and the time that a run pays once."""
        return {**self._settings._asdict(), "threads": torch.get_num_threads(), "setup_s": self._setup_s}

    def matmul_gflops(self) -> float:
        """Best rate of a large matrix product."""
        x = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=getattr(torch, self._dtype))
        best = float("inf")
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(x, x)
            best = min(best, time.perf_counter() - started)
        return 2e-9 * MATMUL_SIZE**3 / best

    def peak_memory_bytes(self) -> int:
        """The most that this process has held."""
        return peak_memory_bytes()

    def _train_client(self, rows: np.ndarray) -> float:
        """Train from the global adapters; the model ends with the client's. Returns the mean loss."""
        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(self._global[name])
        optimizer = torch.optim.AdamW(self._trained.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        total = torch.zeros((), device=self._device)
        for batch in torch.from_numpy(rows).long().to(self._device):
            with self._precision():
                longest = int(self._mask[batch].sum(1).max())  # dynamic padding
                logits = self._logits(self._input_ids[batch, :longest], self._mask[batch, :longest])
            loss = nn.functional.cross_entropy(logits.float(), self._labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / len(rows)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self._dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=torch.bfloat16)


def _pick(adapters: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The engine's array, one layer of it for a factor, that holds the transpose of a parameter's values."""
    parts = name.split(".")
    if parts[0] == "head":
        return adapters["head/w" if parts[1] == "weight" else "head/b"]
    factor = next(part for part in parts if part.startswith("lora_"))[-1].lower()
    module = next(part for part in parts if part in TARGETS)
    return adapters[f"{module}/{factor}"][int(parts[parts.index("layer") + 1])]
