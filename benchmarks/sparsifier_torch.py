"""What PyTorch makes of the same adapters: the side of `sparsifier_throughput.py` that needs no JAX."""

from typing import NamedTuple

import common
import numpy as np

STEP = 0.1
"""What a client changes of its factors, in parts of what it started from."""


class Size(NamedTuple):
    """Clients that each hold the factors of one `width` by `width` matrix."""

    clients: int
    rank: int
    width: int

    @property
    def factor_bytes(self) -> int:
        """Of both factors of one client, float32."""
        return 4 * 2 * self.rank * self.width

    def __str__(self) -> str:
        return f"{self.clients} clients, rank {self.rank}, width {self.width}"


class Drawn(NamedTuple):
    """Factors: `a0 [n, R]` and `b0 [R, n]` that all start from, and `a [C, n, R]`, `b [C, R, n]` after training."""

    a0: np.ndarray
    b0: np.ndarray
    a: np.ndarray
    b: np.ndarray


def draw(size: Size) -> Drawn:
    """Gaussian factors and changes; the same numbers in every process."""
    generator = np.random.default_rng(0)
    a0, b0 = (
        generator.standard_normal(shape, np.float32) for shape in ((size.width, size.rank), (size.rank, size.width))
    )
    a, b = (generator.standard_normal((size.clients, *old.shape), np.float32) for old in (a0, b0))
    for new, old in ((a, a0), (b, b0)):
        new *= STEP
        new += old
    return Drawn(a0, b0, a, b)


class Torch:
    """PyTorch on so many threads."""

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)

    def copy_gb_per_s(self, numbers: int, repeats: int) -> list[float]:
        """Bytes read and written a second by a copy of so many float32 into memory at hand."""
        import torch

        source, target = torch.ones(numbers), torch.zeros(numbers)
        seconds = common.in_turns({"copy": lambda: target.copy_(source)}, repeats, 0.0)["copy"]
        return [8e-9 * numbers / s for s in seconds]

    def times(
        self, size: Size, kept: int, full_clients: int, repeats: int, seconds: float, most_s: float
    ) -> dict[str, list[float]]:
        """Seconds of a call of each of `calls`, see `common.in_turns`."""
        import torch

        with torch.inference_mode():
            return common.in_turns(calls(size, kept, full_clients), repeats, seconds, most_s)


def calls(size: Size, kept: int, full_clients: int) -> dict:
    """Name -> call, on all clients but for the full SVD.

    `topk of ranks` is what `soft` does: norms of the components' changes, the `kept` largest of each client, and the
    masked changes. `topk of values` takes as large a part of all single values of the changes. `QR-based SVD` and
    `full SVD of the product` give the `kept` largest singular triples.

    Args:
      size: of the adapters. kept: components of each client.
      full_clients: of the full SVD; 0 leaves it out.
    """
    import torch

    a0, b0, a, b = map(torch.from_numpy, draw(size))
    values = 2 * kept * size.width

    def topk_of_ranks() -> tuple[torch.Tensor, torch.Tensor]:
        da, db = a - a0, b - b0
        ma, mb = a0 + 0.5 * da, b0 + 0.5 * db
        energy = (da * da).sum(-2) * (mb * mb).sum(-1) + (ma * ma).sum(-2) * (db * db).sum(-1)
        energy += 2 * (da * ma).sum(-2) * (db * mb).sum(-1)
        index = energy.topk(kept, sorted=False).indices
        mask = torch.zeros_like(energy).scatter_(-1, index, 1.0)
        return da * mask[:, None, :], db * mask[:, :, None]

    def topk_of_values() -> tuple[torch.Tensor, torch.Tensor]:
        change = torch.cat([(a - a0).flatten(1), (b - b0).flatten(1)], 1)
        index = change.abs().topk(values, sorted=False).indices
        return change.gather(1, index), index

    def qr_based_svd() -> tuple[torch.Tensor, ...]:
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a), torch.linalg.qr(b.mT)
        u, s, vt = torch.linalg.svd(r_a @ r_b.mT)
        return q_a @ u[..., :kept], s[..., :kept], q_b @ vt.mT[..., :kept]

    def full_svd() -> tuple[torch.Tensor, ...]:
        u, s, vt = torch.linalg.svd(a[:full_clients] @ b[:full_clients], full_matrices=False)
        return u[..., :kept], s[..., :kept], vt[..., :kept, :]

    found = {"topk of ranks": topk_of_ranks, "topk of values": topk_of_values, "QR-based SVD": qr_based_svd}
    return found | ({"full SVD of the product": full_svd} if full_clients else {})
