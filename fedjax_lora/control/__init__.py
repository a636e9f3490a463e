"""Who keeps how many ranks, and sends them on which part of the band, round by round."""

from fedjax_lora.control.fixed import FixedConfig
from fedjax_lora.control.greedy import GreedyConfig
from fedjax_lora.control.ideal import IdealConfig
from fedjax_lora.control.proportional import ProportionalConfig
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.control.uniform import UniformConfig

__all__ = ["FixedConfig", "GreedyConfig", "IdealConfig", "ProportionalConfig", "TsfaConfig", "UniformConfig"]
