"""A small simulation on digits, quick to compile: what the tests of the engine run."""

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.sim.engine import Simulation

SETTINGS = (
    "rounds=6",
    "pretrain.steps=2",
    "clients.count=6",
    "clients.partition.alpha=1.0",
    "lora.max_rank=4",
    "lora.rank=3",
    "lora.targets=[query, up]",
    "local.steps=2",
    "local.batch_size=4",
    "control.keep_ratio=0.7",
    "engine.eval_every=3",
    "engine.client_chunk=1",
)


def config(*overrides: str) -> ExperimentConfig:
    return load_config(None, (*SETTINGS, *overrides))


def simulation(*overrides: str) -> Simulation:
    return build(config(*overrides))
