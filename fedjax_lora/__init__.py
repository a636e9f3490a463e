"""Federated LoRA fine-tuning over wireless networks, as one JAX program.

`load_config` reads a configuration, `build` makes a `Simulation` of it. The parts can be used on their own:
`wireless`, `sparsifiers`, `aggregation`, `control`, `models`. Each is imported when it is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULE_OF = {
    "ConfigError": "config",
    "ExperimentConfig": "config",
    "Simulation": "sim.engine",
    "build": "build",
    "load_config": "config",
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


class _Package(types.ModuleType):
    """Whoever imports the module `build` would bind it here in place of the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "build" and isinstance(value, types.ModuleType)
        super().__setattr__(name, value.build if is_module else value)


sys.modules[__name__].__class__ = _Package
