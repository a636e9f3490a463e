"""What the PyTorch peers share: a small vision transformer with LoRA, one client's training, and a peer's report.

The model has the shape of `vit-tiny` in this project: 8x8 images in four patches, four blocks, 64 wide. Only the
factors and the head are trained. Nothing here imports this project or JAX.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from process_tree import Tree
from torch import nn
from torch.nn import functional as F

PATCH, POSITIONS, WIDTH, LAYERS, HEADS, MLP, CLASSES = 4, 4, 64, 4, 4, 256, 10
RANK, ALPHA = 8, 16.0
NORM_EPS = 1e-6

Model = TypeVar("Model", bound=nn.Module)


class Lora(nn.Module):
    """The low-rank product beside a frozen matrix; it starts at zero."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.a = nn.Parameter(torch.linalg.qr(torch.randn(n_in, RANK))[0].contiguous())
        self.b = nn.Parameter(torch.zeros(RANK, n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n_in] -> [..., n_out]`."""
        return (x @ self.a) @ self.b * (ALPHA / RANK)


class Block(nn.Module):
    """A transformer block that normalises the input of each branch."""

    def __init__(self):
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH, NORM_EPS)
        self.norm_mlp = nn.LayerNorm(WIDTH, NORM_EPS)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, MLP)
        self.down = nn.Linear(MLP, WIDTH)
        self.requires_grad_(False)
        self.query_lora, self.value_lora = Lora(WIDTH, WIDTH), Lora(WIDTH, WIDTH)
        self.up_lora, self.down_lora = Lora(WIDTH, MLP), Lora(MLP, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, d] -> [B, S, d]`."""
        y = self.norm_attention(x)
        query, key, value = self.query_key_value(y).chunk(3, dim=-1)
        query, value = query + self.query_lora(y), value + self.value_lora(y)
        batch, positions, _ = x.shape
        parts = [part.view(batch, positions, HEADS, -1).transpose(1, 2) for part in (query, key, value)]
        y = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        x = x + self.output(y)
        y = self.norm_mlp(x)
        y = F.gelu(self.up(y) + self.up_lora(y))
        return x + self.down(y) + self.down_lora(y)


class Vit(nn.Module):
    """The vision transformer; its factors and its head are trained."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(POSITIONS, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, NORM_EPS)
        self.requires_grad_(False)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`[B, 4, 16]` patches to `[B, 10]` logits."""
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position)).mean(1))

    def loss(self, patches: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        return F.cross_entropy(self(patches), labels)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """What a client trains and sends."""
    return [p for p in module.parameters() if p.requires_grad]


def optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """A client's optimizer: one fused kernel updates all parameters."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


def load(file: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, 4, 16]` patches, row by row, and `[N]` labels of the pool in a file of NumPy."""
    with np.load(file) as pool:
        image, label = torch.from_numpy(pool["image"]), torch.from_numpy(pool["label"]).long()
    grid = image.view(-1, 2, PATCH, 2, PATCH).transpose(2, 3)
    return grid.reshape(-1, POSITIONS, PATCH * PATCH), label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What a peer runs, as the command line gives it.

    data: file of the pool; each client holds the next `steps * batch` rows of it.
    rounds: to time, after one to warm up.
    workers, threads: processes that train clients, and PyTorch's threads in each.
    compile: 1 where torch.compile makes the model's forward and backward pass.
    launched: when the peer was started, in seconds of the clock on the wall.
    trainer: module whose `Trainer` trains the clients.
    """

    data: str
    clients: int
    steps: int
    batch: int
    learning_rate: float
    rounds: int
    workers: int
    threads: int
    compile: int
    launched: float
    trainer: str = "torch_digits"

    @classmethod
    def parse(cls) -> "Round":
        """The options of the command line; each without a default is needed."""
        parser = argparse.ArgumentParser()
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING
            option = {"required": True} if needed else {"default": field.default}
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, **option)  # pyright: ignore
        return cls(**vars(parser.parse_args()))

    def prepare(self, make: Callable[[], Model]) -> Model:
        """The same model in every process, as the settings have it; it sets the threads of PyTorch too."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        made = make()
        if self.compile:
            made.compile()
        return made

    def rows(self, client: int) -> torch.Tensor:
        """The client's rows of the pool in a random order."""
        held = self.steps * self.batch
        return client * held + torch.randperm(held)


class Trainer:
    """One client after the other, in one process that keeps the data and the model."""

    def __init__(self, shape: Round):
        self._shape = shape
        self._patches, self._labels = load(shape.data)
        self._model = shape.prepare(Vit)
        self._trained = trained(self._model)

    def vector(self) -> np.ndarray:
        """The trained parameters as one vector: the first global ones, until a client is trained."""
        return nn.utils.parameters_to_vector(self._trained).detach().numpy()

    def train(self, start: np.ndarray, client: int) -> tuple[np.ndarray, float]:
        """The vector that a client ends with, and its mean loss."""
        nn.utils.vector_to_parameters(torch.tensor(start), self._trained)
        steps = optimizer(self._trained, self._shape.learning_rate)
        total = torch.zeros(())
        for rows in self._shape.rows(client).split(self._shape.batch):
            loss = self._model.loss(self._patches[rows], self._labels[rows])
            steps.zero_grad()
            loss.backward()
            steps.step()
            total += loss.detach()
        return self.vector(), float(total) / self._shape.steps


class Record:
    """Seconds and losses of the rounds, which end where `end` is called; the first round warms up.

    `tree` holds the processes of the peer.
    """

    def __init__(self, shape: Round, tree: Tree):
        self._shape = shape
        self._tree = tree
        self._start_s = time.time() - shape.launched
        self._ends = [time.perf_counter()]
        self._losses: list[float] = []

    def end(self, loss: float) -> None:
        """A round has ended."""
        self._ends.append(time.perf_counter())
        self._losses.append(loss)
        if len(self._losses) == 1:
            self._tree.watch()

    def print(self, parameters: int, **settings: str | int) -> None:
        """Print one line of JSON."""
        seconds = [end - begin for begin, end in zip(self._ends, self._ends[1:], strict=False)]
        report = {
            "settings": {
                "workers": self._shape.workers,
                "threads": self._shape.threads,
                "compile": bool(self._shape.compile),
                **settings,
            },
            "start_s": self._start_s,
            "warm_up_round_s": seconds[0],
            "round_s": seconds[1:],
            "train_loss": self._losses,
            "trained_parameters": parameters,
            "cpu_share_of_others": self._tree.share_of_others(),
            "peak_memory_bytes": self._tree.peak_memory_bytes(),
        }
        print(json.dumps(report), flush=True)
