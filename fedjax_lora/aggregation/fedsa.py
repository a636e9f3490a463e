"""FedSA-LoRA: all is trained, a alone is shared; each client keeps its own b and head.

P. Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463. That
the head stays with the client is our choice.
"""

import dataclasses
from typing import Literal

from fedjax_lora.aggregation import fedit
from fedjax_lora.core.exchange import Aggregator
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedSaConfig(Options):
    """Share a alone; there is nothing to choose."""

    name: Literal["fedsa"] = "fedsa"


def make(options: FedSaConfig, context: Context) -> Aggregator:
    """The aggregator of a shared a under the clients' own b and heads.

    The server's b and head stay as they were at the start, b = 0. The global accuracy is that of the shared a with the
    mean of the clients' b and heads, which is never sent; the clients' own is `Metrics.personal_accuracy`. Both error
    norms are 0, since what is shared has no product.
    """
    del options, context  # it has none yet, but every method is made in the same way
    return fedit.AVERAGE._replace(personal=("b", "head"))


METHOD = Method(
    "aggregation",
    "fedsa",
    FedSaConfig,
    make,
    needs=frozenset({"whole_at_client"}),
    breaks=frozenset({"shared_b"}),
)
