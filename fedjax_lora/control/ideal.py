"""No network: every client keeps the same share of its ranks, and nothing takes time."""

import dataclasses
from typing import Literal

from fedjax_lora.control.common import CommonRatio, at_equal_split
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdealConfig(CommonRatio):
    """No network at all."""

    name: Literal["ideal"] = "ideal"


def make(options: IdealConfig, context: Context) -> Controller:
    """The same part of the band for everybody, which nothing is sent over."""
    del context
    return Controller(allocate=at_equal_split(options.keep_ratio), over_the_air=False)


METHOD = Method("control", "ideal", IdealConfig, make)
