"""Experiments that run as they are, with nothing to download: YAML files that begin with a line that describes them."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedjax_lora.config.experiment import ExperimentConfig


def _description(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"), key=lambda path: path.stem)}
PRESETS = {name: _description(path) for name, path in _FILES.items()}
"""Name -> description."""


def preset(name: str) -> "ExperimentConfig":
    """The preset of that name.

    Raises:
      ConfigError: there is none; names those that there are.
    """
    # Slow to import: the list of presets needs none of it.
    from fedjax_lora.config.experiment import load_config
    from fedjax_lora.core.errors import ConfigError

    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{hint}")
    return load_config(_FILES[name])
