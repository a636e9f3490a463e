"""The same part of the band and the same share of the ranks for everybody."""

import dataclasses
from typing import Literal

from fedjax_lora.control.common import CommonRatio, at_equal_split
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.network import Controller


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformConfig(CommonRatio):
    """The same part of the band for every client that takes part and can be heard."""

    name: Literal["uniform"] = "uniform"


def make(options: UniformConfig, context: Context) -> Controller:
    """Equal shares of the band for the clients that take part and can be heard."""
    del context
    return Controller(allocate=at_equal_split(options.keep_ratio))


METHOD = Method("control", "uniform", UniformConfig, make)
