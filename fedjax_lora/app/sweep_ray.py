"""Sweeps on Ray: the trials of each structure are a task, on any machine of a cluster that sees the sweep's folder."""

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_lora.app.common import load_configuration, methods_of
from fedjax_lora.app.sweep_folder import load_all, part_into, summed_up
from fedjax_lora.config.groups import by_structure
from fedjax_lora.config.sweeps import Setting, folder_name, overrides
from fedjax_lora.core.errors import ConfigError, RunWarning
from fedjax_lora.io.files import check_can_hold_files
from fedjax_lora.io.lock import locked
from fedjax_lora.io.sweep import Sweep, discard_found

RETRIES = 3
"""How often a task whose worker has died is tried again."""


def sweep_on_ray(
    path: Path, settings: Sequence[Setting], options: argparse.Namespace, address: str, console: Console
) -> Sweep:
    """Run a sweep as `sweep_into` does, each structure in a process of its own.

    What has ended is not run again. A task whose worker dies is tried again, RETRIES times, and goes on from the last
    segment of each trial. A task that fails is divided, and each of its trials tried by itself: one that fails then is
    refused, with its error, and stops no other.

    Args:
      path: of the folder, which every worker sees at the same place.
      settings: swept keys -> values of each trial.
      options: `config`, `preset`, `overrides` and `methods` of the command line.
      address: of a cluster, or `local` for this machine.
      console: told how far it is.

    Raises:
      ConfigError: Ray is not installed, or all settings are refused: the first reason.
      ValueError: a folder is in use.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]  # of the extra `ray`
    except ImportError as error:
        raise ConfigError("--ray must have Ray: pip install 'fedjax-lora[ray]'") from error
    methods, given = methods_of(options), _given(options)
    configs, refused = load_all(settings, lambda setting: load_configuration(options, methods, overrides(setting)))
    if not configs:
        raise next(iter(refused.values()))
    check_can_hold_files(path)
    path.mkdir(parents=True, exist_ok=True)
    by_name = {folder_name(setting): setting for setting in settings}
    names = list(configs)
    parts = [[names[place] for place in places] for places in by_structure(list(configs.values()))]
    reasons = {name: " ".join(str(error).split()) for name, error in refused.items()}
    with locked(path):
        discard_found(path)
        _connect(ray, address)
        try:
            console.print(f"{len(settings)} trials: {len(parts)} tasks on {_resources(ray)}")
            task = ray.remote(max_retries=RETRIES, **_share(ray))(_part)

            def submit(part: Sequence[str]) -> Any:
                return task.remote(str(path.absolute()), [by_name[name] for name in part], given)

            reasons |= _gather(ray, {submit(part): part for part in parts}, submit, console)
        finally:
            ray.shutdown()
    for name, reason in reasons.items():
        warnings.warn(f"{name} is refused: {reason}", RunWarning, stacklevel=2)
    return summed_up(path, settings, reasons, ())


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, **({"include_dashboard": False} if address == "local" else {}))
    except Exception as error:  # of Ray's own kinds, and of its parts
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--ray must be local or the address of a cluster that answers, got {address}: {reason}"
        ) from error


def _gather(ray: Any, running: dict[Any, list[str]], submit: Any, console: Console) -> dict[str, str]:
    """Wait for all tasks, and for those that they are divided into; name -> why it was refused."""
    reasons: dict[str, str] = {}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        part = running.pop(done)
        try:
            found = ray.get(done)
            reasons |= found
            console.print(f"ended: {', '.join(name for name in part if name not in found) or 'none'}")
        except ray.exceptions.RayError as error:
            if len(part) > 1:
                running |= {submit([name]): [name] for name in part}
            else:
                reasons[part[0]] = f"failed: {_cause(error)}"
    return reasons


def _cause(error: Exception) -> str:
    """In one line, without the traceback that Ray puts before it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What describes the experiment, for a worker that starts elsewhere."""
    config = os.path.abspath(options.config) if options.config else None
    methods = [os.path.abspath(name) if os.path.isfile(name) else name for name in options.methods]
    return {"config": config, "preset": options.preset, "overrides": list(options.overrides), "methods": methods}


def _share(ray: Any) -> dict[str, Any]:
    """What of a machine a task takes: a GPU, the TPU of a host, or else a core."""
    held = ray.cluster_resources()
    if held.get("GPU"):
        return {"num_gpus": 1}
    if held.get("TPU"):
        return {"resources": {"TPU": max(node["Resources"].get("TPU", 0) for node in ray.nodes())}}
    return {"num_cpus": 1, "runtime_env": {"env_vars": {"JAX_NUM_CPU_DEVICES": "1"}}}


def _resources(ray: Any) -> str:
    held = ray.cluster_resources()
    return ", ".join(f"{held[name]:g} {name}" for name in ("CPU", "GPU", "TPU") if held.get(name))


def _part(path: str, settings: Sequence[Setting], given: Mapping[str, Any]) -> dict[str, str]:
    """In a worker: `part_into` for the configuration that the command line described."""
    from fedjax_lora.app.common import start

    start()
    options = argparse.Namespace(**given)
    methods = methods_of(options)
    return part_into(
        Path(path), settings, lambda setting: load_configuration(options, methods, overrides(setting)), methods
    )
