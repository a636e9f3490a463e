"""The presets against their settings, written out again here."""

import dataclasses

import pytest

from fedjax_lora.adapters.lora import LoraConfig
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.config.presets import PRESETS, preset
from fedjax_lora.control.fixed import FixedConfig
from fedjax_lora.control.ideal import IdealConfig
from fedjax_lora.control.split_lyapunov import SplitLyapunovConfig
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.data.partition import ClientsConfig, PartitionConfig
from fedjax_lora.models.load import ModelConfig
from fedjax_lora.sparsifiers.dense import DenseConfig
from fedjax_lora.sparsifiers.soft_rotated import SoftRotatedConfig
from fedjax_lora.training.local import LocalConfig
from fedjax_lora.training.optimizers import OptimizerConfig
from fedjax_lora.training.split import SplitOptions


def digits(sparsifier, control) -> ExperimentConfig:
    return ExperimentConfig(
        rounds=40,
        model=ModelConfig(name="vit-tiny"),
        lora=LoraConfig(targets=("query", "value", "up", "down")),
        data=Catalogue.of().find("data", "digits").options(source="digits"),
        clients=ClientsConfig(count=50, weighting="equal", partition=PartitionConfig(kind="dirichlet", alpha=0.5)),
        local=LocalConfig(optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear")),
        sparsifier=sparsifier,
        control=control,
    )


EXPECTED = {
    "digits": digits(SoftRotatedConfig(), FixedConfig(keep_ratio=0.25)),
    "digits-ideal": digits(DenseConfig(), IdealConfig()),
    "digits-split": dataclasses.replace(
        digits(DenseConfig(), SplitLyapunovConfig(latency_budget_s=10.0)), training=SplitOptions()
    ),
    "digits-splitfrozen": dataclasses.replace(
        digits(DenseConfig(), SplitLyapunovConfig(latency_budget_s=10.0)),
        training=SplitOptions(device_layers=2, device_adapters="frozen", task="server"),
    ),
    "digits-tsfa": digits(SoftRotatedConfig(), TsfaConfig(latency_budget_s=20.0)),
}


def test_all_presets_are_known_each_with_a_description():
    assert list(PRESETS) == list(EXPECTED)
    assert all(description.endswith(".") for description in PRESETS.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_it_was(name):
    assert preset(name) == EXPECTED[name]
