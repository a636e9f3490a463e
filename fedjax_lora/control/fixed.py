"""One share of the ranks for everybody, and shares of the band that make the round as short as can be."""

import dataclasses
from typing import Literal

from fedjax_lora.control import common
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedConfig(common.CommonRatio):
    """Shares of the band by `wireless.min_max_latency`, at one keep ratio for all."""

    name: Literal["fixed"] = "fixed"


def make(options: FixedConfig, context: Context) -> Controller:
    """Shares of least latency; a client that cannot send gets none, and the others share as if it were absent."""
    del context
    return Controller(allocate=common.at_least_latency(options.keep_ratio))


METHOD = Method("control", "fixed", FixedConfig, make)
