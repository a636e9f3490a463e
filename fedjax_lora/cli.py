"""The command line. A user's mistake ends in one line on stderr and exit code 2."""

import argparse
import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_lora import __version__
from fedjax_lora.reading import Notice

_OUT_OF_MEMORY = (
    "fedjax-lora: error: out of memory; lower engine.client_chunk, engine.eval_batch_size or local.batch_size, "
    "or take fewer clients.per_round"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with _warnings_in_one_line():
            return options.command(options)
    except (ValueError, OSError) as error:
        print(f"fedjax-lora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print(_OUT_OF_MEMORY, file=sys.stderr)
        return 2
    except RuntimeError as error:  # XLA's own, which says so in its first word alone
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        print(_OUT_OF_MEMORY, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedjax-lora: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """A Notice is a line on stderr, each time, without the line of code that Python would name."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *where: Any, **to: Any) -> None:
            if issubclass(category, Notice):
                print(f"fedjax-lora: warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **to)

        warnings.showwarning = show_line
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fedjax-lora", description="Federated LoRA fine-tuning over wireless networks, in JAX.")
    parser.add_argument("--version", action="version", version=f"fedjax-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment", description="Run an experiment.")
    _experiment_arguments(run)
    run.add_argument("--out", metavar="DIR", help="folder of the run; runs/<preset or file name> by default")
    run.add_argument("--plan", metavar="PLAN.json", help="take rank, V and queue from what `fedjax-lora plan` wrote")
    run.add_argument("--resume", action="store_true", help="continue the run that DIR holds")
    run.set_defaults(command=_run)

    plan = commands.add_parser(
        "plan",
        help="choose rank, V and first queue before a run",
        description="Choose the structural rank, and V and queue_s of control.name=tsfa, by a pilot and the channel.",
    )
    _experiment_arguments(plan)
    plan.add_argument("--out", metavar="DIR", help="folder of the plan; plans/<preset or file name> by default")
    plan.set_defaults(command=_plan)

    sweep = commands.add_parser(
        "sweep",
        help="run every combination of values",
        description="Run every combination of the values of some keys; runs that have ended are not run again.",
    )
    _experiment_arguments(sweep)
    sweep.add_argument("--out", metavar="DIR", help="folder of the runs; runs/<preset or file name>-sweep by default")
    sweep.add_argument(
        "--over",
        nargs="+",
        action="extend",
        required=True,
        metavar="a.b=[v1,v2]",
        help="a key and its values; may be repeated",
    )
    sweep.set_defaults(command=_sweep)

    report = commands.add_parser("report", help="compare runs", description="Write one report over several runs.")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of the runs of a sweep")
    report.add_argument("--out", default="report.html", metavar="FILE", help="report.html by default")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="export adapters", description="Export a run's adapters.")
    export.add_argument("run", metavar="RUN", help="folder of a run")
    export.add_argument("folder", metavar="DIR", help="new folder to write to")
    export.add_argument("--format", choices=["peft"], default="peft", help="peft: a folder for PeftModel")
    export.set_defaults(command=_export)

    presets = commands.add_parser("presets", help="list the presets", description="List the presets.")
    presets.set_defaults(command=_presets)
    return parser


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="what differs from the defaults or the preset")
    parser.add_argument("--preset", metavar="NAME", help="start from a preset (see `fedjax-lora presets`)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b=value",
        dest="overrides",
        help="override a key; may be repeated",
    )


# Each command imports what it needs: `presets` should not wait for the plots.


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fedjax_lora.config import load_config
    from fedjax_lora.io.log import read_metrics
    from fedjax_lora.io.plan import apply_plan, effects_of_run, read_plan
    from fedjax_lora.presets import preset
    from fedjax_lora.report.plan import binding, choice
    from fedjax_lora.report.tables import summary_lines
    from fedjax_lora.runner import run
    from fedjax_lora.sim.cohort import use_cpu_cores

    use_cpu_cores()
    name = _preset_name(options)
    config = load_config(options.config, options.overrides, base=preset(name) if name else None)
    path = Path(options.out or Path("runs") / (name or Path(options.config).stem))
    console = Console(highlight=False)
    plan = read_plan(options.plan) if options.plan else None
    if plan:
        config = apply_plan(plan, config, options.plan)
        console.print(f"by the plan: {choice(plan)}", soft_wrap=True)
    summary = run(config, path, options.resume, console, plan)
    console.print(summary_lines(summary))
    if plan:
        console.print(binding(effects_of_run(plan, read_metrics(path))), soft_wrap=True)
    console.print(f"report: {path / 'report.html'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fedjax_lora.config import load_config
    from fedjax_lora.io import plan as plans
    from fedjax_lora.io.files import check_can_hold_files
    from fedjax_lora.io.log import is_run
    from fedjax_lora.planner import plan
    from fedjax_lora.presets import preset
    from fedjax_lora.report.plan import binding, choice, plan_table, plot_plan
    from fedjax_lora.sim.cohort import use_cpu_cores

    use_cpu_cores()
    name = options.preset or (None if options.config else "digits-tsfa")
    config = load_config(options.config, options.overrides, base=preset(name) if name else None)
    folder = Path(options.out or Path("plans") / (name or Path(options.config).stem))
    console = Console(highlight=False)
    check_can_hold_files(folder)
    if is_run(folder):
        raise ValueError(f"--out {folder} must be a folder for a plan, got that of a run")
    found = plan(config, console)
    folder.mkdir(parents=True, exist_ok=True)
    plans.write_plan(found, folder / plans.NAME)
    plot_plan(found, folder / "plan.png")
    Console(width=max(console.width, 160)).print(plan_table(found))  # a pager cuts better than a table does
    console.print(binding(plans.effects_of_plan(found)), soft_wrap=True)
    if not found.within_budget:
        over = found.chosen["latency_s"] / found.config["control.latency_budget_s"]
        console.print(
            f"note: rank {found.rank} takes {over:.3g} of control.latency_budget_s, near the least of all ranks"
        )
    start = [*([options.config] if options.config else []), *(["--preset", name] if name else [])]
    overrides = ["--set", *options.overrides] if options.overrides else []
    command = shlex.join(["fedjax-lora", "run", *start, "--plan", str(folder / plans.NAME), *overrides])
    console.print(f"{choice(found)}: take it with {command}", soft_wrap=True, markup=False)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fedjax_lora.config import ExperimentConfig, load_config
    from fedjax_lora.presets import preset
    from fedjax_lora.sim.cohort import use_cpu_cores
    from fedjax_lora.sweep import sweep

    use_cpu_cores()
    name = _preset_name(options)
    base = preset(name) if name else None

    def load(values: list[str]) -> ExperimentConfig:
        return load_config(options.config, [*options.overrides, *values], base=base)

    path = Path(options.out or Path("runs") / f"{name or Path(options.config).stem}-sweep")
    print(sweep(options.over, load, path, Console(highlight=False)))
    print(f"report: {path / 'report.html'}")
    return 0


def _preset_name(options: argparse.Namespace) -> str | None:
    """The preset to start from: the one that is asked for, or `digits` where nothing is."""
    return options.preset or (None if options.config else "digits")


def _report(options: argparse.Namespace) -> int:
    from fedjax_lora.report.html import write_report
    from fedjax_lora.report.tables import comparison

    print(comparison(options.runs))
    write_report(options.runs, options.out)
    print(f"report: {options.out}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from fedjax_lora.export import export_run

    export_run(options.run, options.folder)
    print(f"adapters: {options.folder}")
    return 0


def _presets(options: argparse.Namespace) -> int:
    del options
    from fedjax_lora.presets import PRESETS

    width = max(map(len, PRESETS))
    for name, make in PRESETS.items():
        print(f"{name:<{width}}  {(make.__doc__ or '').splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
