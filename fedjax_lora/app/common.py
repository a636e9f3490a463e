"""What the commands share: where they speak, and what their arguments describe."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedjax_lora.config.experiment import ExperimentConfig
    from fedjax_lora.config.user_methods import UserMethods


def start() -> None:
    """What goes before JAX is first used."""
    from fedjax_lora.data.cache import keep_programs
    from fedjax_lora.sim.cohort import use_cpu_cores

    use_cpu_cores()
    keep_programs()


def join(options: argparse.Namespace) -> None:
    """Become one of several processes where the options or a launcher say so: the first one alone speaks."""
    from fedjax_lora.core import hosts

    hosts.join(options.distributed)
    if not hosts.first():
        options.quiet, options.json = True, False


def console_of(options: argparse.Namespace) -> "Console":
    """Where a command speaks: to stdout, to stderr where that is for a document, or not at all."""
    from rich.console import Console

    # Lines and tables as they are: a terminal or a pager cuts them better.
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=options.quiet, stderr=options.json)


def print_document(options: argparse.Namespace, document: Any) -> None:
    """Print what --json asks for."""
    if options.json:
        print(json.dumps(document, indent=2, allow_nan=False))


def preset_of(options: argparse.Namespace, default: str, console: "Console | None") -> str | None:
    """The preset to start from: the one that is asked for, or `default` where nothing is; the console is told so."""
    if options.preset or options.config:
        return options.preset
    if console:
        console.print(f"preset {default}, as neither a file nor --preset is given")
    return default


def methods_of(options: argparse.Namespace) -> "UserMethods":
    """The methods that --methods names."""
    from fedjax_lora.config.user_methods import load

    return load(options.methods)


def load_configuration(
    options: argparse.Namespace, methods: "UserMethods", values: Sequence[str] = ()
) -> "ExperimentConfig":
    """The configuration that the arguments describe, with `values` over them."""
    from fedjax_lora.config.experiment import load_config
    from fedjax_lora.config.presets import preset

    base = preset(options.preset) if options.preset else None
    return load_config(options.config, [*options.overrides, *values], base=base, methods=methods.methods)


def folder_of(options: argparse.Namespace, default: str) -> Path:
    """--out, or `default` with the name of the preset or the file."""
    return Path(options.out or default.format(options.preset or Path(options.config).stem))


def again(options: argparse.Namespace) -> list[str]:
    """The arguments that describe the same experiment."""
    start = [*([options.config] if options.config else []), *(["--preset", options.preset] if options.preset else [])]
    return [*start, *named(options), *(["--set", *options.overrides] if options.overrides else [])]


def named(options: argparse.Namespace) -> list[str]:
    """The arguments that name the same methods."""
    return [word for name in options.methods for word in ("--methods", name)]
