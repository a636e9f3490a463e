"""Who gets which keep ratio and how much bandwidth, round by round."""

from fedjax_lora.control.baselines import FixedConfig, IdealConfig, UniformConfig, fixed, ideal, uniform

__all__ = ["FixedConfig", "IdealConfig", "UniformConfig", "fixed", "ideal", "uniform"]
