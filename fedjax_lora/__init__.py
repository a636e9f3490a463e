"""Federated LoRA fine-tuning over wireless networks, as one JAX program.

`load_config` reads a configuration, `build` makes a `Simulation` of it, `load_run` reads the folder of a run. The parts
can be used on their own: `wireless`, `sparsifiers`, `aggregation`, `control`, `models`; `methods` is what a method of
one's own is written with. Each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedjax_lora import aggregation, control, methods, models, sparsifiers, wireless
    from fedjax_lora.app.load_run import load_run
    from fedjax_lora.app.sweep import Trials, sweep, sweep_network
    from fedjax_lora.config.assemble import build
    from fedjax_lora.config.experiment import ExperimentConfig, load_config
    from fedjax_lora.core.errors import ConfigError
    from fedjax_lora.sim.cohort import use_cpu_cores
    from fedjax_lora.sim.engine import Simulation

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ExperimentConfig",
    "Simulation",
    "Trials",
    "aggregation",
    "build",
    "control",
    "load_config",
    "load_run",
    "methods",
    "models",
    "sparsifiers",
    "sweep",
    "sweep_network",
    "use_cpu_cores",
    "wireless",
]

_MODULE_OF = {
    "ConfigError": "core.errors",
    "ExperimentConfig": "config.experiment",
    "Simulation": "sim.engine",
    "Trials": "app.sweep",
    "build": "config.assemble",
    "load_config": "config.experiment",
    "load_run": "app.load_run",
    "sweep": "app.sweep",
    "sweep_network": "app.sweep",
    "use_cpu_cores": "sim.cohort",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
