"""Who gets which keep ratio and how much bandwidth, round by round."""

from fedjax_lora.control.baselines import FixedConfig, IdealConfig, UniformConfig, fixed, ideal, uniform
from fedjax_lora.control.budgeted import GreedyConfig, ProportionalConfig, greedy, proportional
from fedjax_lora.control.tsfa_online import TsfaConfig

__all__ = [
    "FixedConfig",
    "GreedyConfig",
    "IdealConfig",
    "ProportionalConfig",
    "TsfaConfig",
    "UniformConfig",
    "fixed",
    "greedy",
    "ideal",
    "proportional",
    "uniform",
]
