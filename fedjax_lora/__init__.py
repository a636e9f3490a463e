"""Federated LoRA fine-tuning over wireless networks, as one JAX program.

`load_config` reads a configuration, `build` makes a `Simulation` of it. The parts can be used on their own:
`wireless`, `sparsifiers`, `aggregation`, `control`, `models`.
"""

from fedjax_lora import aggregation, control, models, sparsifiers, wireless
from fedjax_lora.build import build
from fedjax_lora.config import ConfigError, ExperimentConfig, load_config
from fedjax_lora.sim.cohort import use_cpu_cores
from fedjax_lora.sim.engine import Simulation

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ExperimentConfig",
    "Simulation",
    "aggregation",
    "build",
    "control",
    "load_config",
    "models",
    "sparsifiers",
    "use_cpu_cores",
    "wireless",
]
