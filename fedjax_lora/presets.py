"""Experiments that run as they are, with nothing to download: plain functions that return a configuration."""

import dataclasses
import difflib
from collections.abc import Callable

from fedjax_lora.config import ConfigError, ExperimentConfig
from fedjax_lora.control.baselines import FixedConfig, IdealConfig
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.data.partition import ClientsConfig, PartitionConfig
from fedjax_lora.data.sources import DataConfig
from fedjax_lora.lora.adapters import LoraConfig
from fedjax_lora.models.load import ModelConfig
from fedjax_lora.sim.local import LocalConfig
from fedjax_lora.sim.optimizers import OptimizerConfig
from fedjax_lora.sparsifiers.dense import DenseConfig
from fedjax_lora.sparsifiers.soft_rotated import SoftRotatedConfig


def digits() -> ExperimentConfig:
    """A tiny vision transformer on handwritten digits: 50 clients that send a quarter of the ranks, rotated."""
    return ExperimentConfig(
        rounds=40,
        model=ModelConfig(name="vit-tiny"),
        lora=LoraConfig(targets=("query", "value", "up", "down")),
        data=DataConfig(source="digits"),
        clients=ClientsConfig(count=50, weighting="equal", partition=PartitionConfig(kind="dirichlet", alpha=0.5)),
        local=LocalConfig(optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear")),
        sparsifier=SoftRotatedConfig(),
        control=FixedConfig(keep_ratio=0.25),
    )


def digits_ideal() -> ExperimentConfig:
    """The same digits without a network, with every rank sent: what the others are measured against."""
    return dataclasses.replace(digits(), sparsifier=DenseConfig(), control=IdealConfig())


def digits_tsfa() -> ExperimentConfig:
    """The same digits under a long-term latency budget: TSFA chooses keep ratios and bandwidth in every round."""
    return dataclasses.replace(digits(), control=TsfaConfig(latency_budget_s=20.0))


PRESETS: dict[str, Callable[[], ExperimentConfig]] = {
    "digits": digits,
    "digits-ideal": digits_ideal,
    "digits-tsfa": digits_tsfa,
}


def preset(name: str) -> ExperimentConfig:
    """The preset of that name.

    Raises:
      ConfigError: there is none; names those that there are.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{hint}")
    return PRESETS[name]()
