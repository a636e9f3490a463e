"""Who holds what: every training example goes to exactly one client, but for what Flower's partitioners leave out.

A population that is sampled is the exception: its clients draw their examples, and may hold the same ones.
"""

import dataclasses
import hashlib
import math
from typing import Literal, get_args

import numpy as np

from fedjax_lora.core.mapping import Mapped
from fedjax_lora.data import flower
from fedjax_lora.data.sampled import Sampled, sampled

Kind = Literal["iid", "dirichlet", "shards", "natural", "flwr", "sampled"]
Weighting = Literal["examples", "equal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How labels are spread over clients.

    kind: `iid`, `dirichlet`, `shards`, `natural`, `flwr` or `sampled`; see `partition`.
    alpha: concentration of the Dirichlet: large is near iid, small gives each label to few clients.
    shards_per_client: runs of sorted labels that a client receives.
    min_examples: what every client holds at least.
    partitioner: class of `flwr_datasets.partitioner`; for `flwr` only.
    options: what it is made with, beside the number of clients, the label's column and the seed.
    examples: that each client draws; for `sampled` only.
    """

    kind: Kind = "dirichlet"
    alpha: float = 0.5
    shards_per_client: int = 2
    min_examples: int = 1
    partitioner: str | None = None
    options: Mapped = dataclasses.field(default_factory=Mapped)
    examples: int | None = None

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if self.shards_per_client < 1:
            raise ValueError(f"shards_per_client must be at least 1, got {self.shards_per_client}")
        if self.min_examples < 1:
            raise ValueError(f"min_examples must be at least 1, got {self.min_examples}")
        if (self.kind == "flwr") != bool(self.partitioner):
            allowed = "a class of flwr_datasets.partitioner" if self.kind == "flwr" else "absent"
            raise ValueError(f"partitioner must be {allowed} when kind is {self.kind}, got {self.partitioner!r}")
        if self.options and self.kind != "flwr":
            raise ValueError(f"options must be absent when kind is {self.kind}, got {dict(self.options)}")
        if self.kind == "sampled" and (self.examples is None or self.examples < 1):
            raise ValueError(f"examples must be at least 1 when kind is sampled, got {self.examples}")
        if self.kind != "sampled" and self.examples is not None:
            raise ValueError(f"examples must be absent when kind is {self.kind}, got {self.examples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientsConfig:
    """The clients and their data.

    count: K, clients in all.
    per_round: C, clients of one round's cohort, or that run at once where each begins at a time of its own; None for
      all.
    weighting: of the average: by each client's number of examples, as FedAvg does, or all alike. Since every client
      takes as many local steps as any other, `equal` weighs them by work; it is steadier where sizes differ much.
    partition: how the training examples are spread over them.
    """

    count: int = 64
    per_round: int | None = None
    weighting: Weighting = "examples"
    partition: PartitionConfig = PartitionConfig()

    def __post_init__(self):
        """Raises ValueError on a value that is not allowed."""
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}")
        if self.per_round is not None and not 1 <= self.per_round <= self.count:
            raise ValueError(f"per_round must be between 1 and count = {self.count}, got {self.per_round}")


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """The rows of the training pool that each client holds.

    index: `[K, n_max]` int32; row k holds `count[k]` rows in ascending order, then repeats of its first; or what draws
      them, which is indexed alike.
    count: `[K]` int32, at least 1.
    hash: SHA-256 of both, to record and to compare.
    """

    index: np.ndarray | Sampled
    count: np.ndarray
    hash: str


def partition(
    config: PartitionConfig, labels: np.ndarray, num_clients: int, seed: int, clients: np.ndarray | None = None
) -> Partition:
    """Gives every example to one client; the same seed gives the same partition.

    `iid`: a random deal; sizes differ by at most one.
    `dirichlet`: for each label, the clients' shares of its examples are drawn from a symmetric Dirichlet of
      concentration alpha, as by Yurochkin et al. (2019) and Li et al. (2022, NIID-Bench). Hsu et al. (2019)
      draw the other way around, a mixture of labels for each client of a given size; here sizes vary as well.
    `shards`: examples sorted by label are cut into equal shards, dealt at random (McMahan et al., 2017).
    `natural`: as the data say.
    `flwr`: as a partitioner of Flower Datasets deals them, see `flower.owners`; some leave examples out.
    `sampled`: each client draws so many examples, with replacement, when it takes part, see `Sampled`: a population may
      be larger than the pool, and nothing is stored of who holds what.

    But for `natural` and `sampled`, a client left with fewer than `min_examples` then receives random examples, one by
    one, from whoever holds the most at that time: no redrawing, so it always ends.

    Args:
      config: the kind and its numbers.
      labels: `[N]` integers.
      num_clients: K.
      seed: of NumPy's generator.
      clients: `[N]` integers, who holds each example, where the data say so.

    Raises:
      ValueError: there are not enough examples, or the data name other clients or none.
    """
    if config.kind == "natural":
        return _tabulate(_natural(clients, num_clients, config.min_examples), num_clients)
    if config.examples is not None:
        drawn = sampled(labels, examples=config.examples, alpha=config.alpha, seed=seed)
        return Partition(drawn, np.full(num_clients, config.examples, "<i4"), drawn.hash(num_clients))
    num_examples = len(labels)
    _check_count(config, num_clients, num_examples, "examples")
    if config.kind == "shards" and config.shards_per_client > num_examples:
        raise ValueError(
            f"clients.partition.shards_per_client must be at most {num_examples}, the examples, "
            f"got {config.shards_per_client}"
        )
    generator = np.random.default_rng(seed)
    if config.kind == "iid":
        owner = _deal(generator, num_examples, num_clients)
    elif config.kind == "dirichlet":
        owner = _dirichlet(generator, labels, num_clients, config.alpha)
    elif config.kind == "flwr":
        owner = flower.owners(str(config.partitioner), config.options, labels, clients, num_clients, seed)
        _check_count(config, num_clients, int((owner >= 0).sum()), f"examples that {config.partitioner} deals")
    else:
        owner = _shards(generator, labels, num_clients, config.shards_per_client)
    _fill_up(generator, owner, num_clients, config.min_examples)
    return _tabulate(owner, num_clients)


def _check_count(config: PartitionConfig, num_clients: int, num_examples: int, which: str) -> None:
    """Raise ValueError where so many examples are too few for the clients."""
    most = num_examples // config.min_examples
    if num_clients > most:
        raise ValueError(
            f"clients.count must be at most {most} ({num_examples} {which}, at least "
            f"{config.min_examples} for each client), got {num_clients}"
        )


def _deal(generator: np.random.Generator, num_examples: int, num_clients: int) -> np.ndarray:
    """`[N]` owner of each example: a shuffled deck, dealt around the table."""
    return generator.permutation(np.arange(num_examples) % num_clients)


def _dirichlet(generator: np.random.Generator, labels: np.ndarray, num_clients: int, alpha: float) -> np.ndarray:
    """`[N]` owner of each example, label by label."""
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        share = generator.dirichlet(np.full(num_clients, alpha))
        # one random offset for all cuts: each client's number of examples is share * len(rows), rounded up or
        # down without bias, even where there are fewer examples than clients
        cuts = np.floor(np.cumsum(share)[:-1] * len(rows) + generator.random()).astype(np.int64)
        owner[rows] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    return owner


def _shards(generator: np.random.Generator, labels: np.ndarray, num_clients: int, shards_per_client: int) -> np.ndarray:
    """`[N]` owner of each example, shard by shard."""
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    num_shards = num_clients * shards_per_client
    shard_owner = _deal(generator, num_shards, num_clients)
    owner = np.empty(len(labels), np.int64)
    owner[by_label] = shard_owner[np.arange(len(labels)) * num_shards // len(labels)]
    return owner


def _natural(clients: np.ndarray | None, num_clients: int, min_examples: int) -> np.ndarray:
    """`[N]` owner of each example, as the data say."""
    where = "where clients.partition.kind is natural"
    if clients is None:
        raise ValueError(f"data must say who holds each example {where}, by a column `client` or data.columns.client")
    count = np.bincount(clients)
    if len(count) != num_clients:
        raise ValueError(f"clients.count must be {len(count)}, the clients of the data, {where}, got {num_clients}")
    if count.min() < min_examples:
        raise ValueError(
            f"clients.partition.min_examples must be at most {count.min()}, the examples of the smallest client, "
            f"{where}, got {min_examples}"
        )
    return clients


def _fill_up(generator: np.random.Generator, owner: np.ndarray, num_clients: int, min_examples: int) -> None:
    """Moves examples, in place, until every client holds `min_examples`."""
    count = np.bincount(owner[owner >= 0], minlength=num_clients)
    for client in np.flatnonzero(count < min_examples):
        while count[client] < min_examples:
            donor = np.argmax(count)
            owner[generator.choice(np.flatnonzero(owner == donor))] = client
            count[donor] -= 1
            count[client] += 1


def _tabulate(owner: np.ndarray, num_clients: int) -> Partition:
    """Index table of `[N]` owners, each of whom holds at least one example; -1 is nobody."""
    count = np.bincount(owner[owner >= 0], minlength=num_clients)
    rows = np.argsort(owner, kind="stable")[len(owner) - count.sum() :]
    start = np.cumsum(count) - count
    offset = np.arange(count.max())
    index = rows[start[:, None] + np.where(offset < count[:, None], offset, 0)].astype("<i4")
    count = count.astype("<i4")
    sha256 = hashlib.sha256(repr(index.shape).encode() + index.tobytes() + count.tobytes())
    return Partition(index, count, sha256.hexdigest())
