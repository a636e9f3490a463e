"""The command line. A user's mistake ends in one line on stderr and exit code 2."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedjax_lora.app.arguments import make_parser, take_files
from fedjax_lora.app.common import (
    again,
    console_of,
    folder_of,
    join,
    load_configuration,
    methods_of,
    named,
    preset_of,
    print_document,
    start,
)

if TYPE_CHECKING:
    from fedjax_lora.config.experiment import ExperimentConfig

_OUT_OF_MEMORY = (
    "fedjax-lora: error: out of memory; lower engine.client_chunk, engine.eval_batch_size, local.batch_size "
    "or, of a sweep, engine.trials_at_once, or take fewer clients.per_round"
)

_CACHE_TROUBLE = ("Error reading persistent compilation cache", "Error writing persistent compilation cache")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = make_parser().parse_args(arguments)
    try:
        with _warnings_in_one_line():
            take_files(options)
            return _COMMANDS[options.command](options)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
    except KeyboardInterrupt as interrupted:
        return _left(interrupted, sys.argv[1:] if arguments is None else arguments)


def _left(interrupted: KeyboardInterrupt, arguments: Sequence[str]) -> int:
    """Say that a signal has ended the command, and how it goes on where it has saved; the exit code of a shell."""
    number, saved = getattr(interrupted, "number", signal.SIGINT), getattr(interrupted, "saved", None)
    if saved is None:
        print(f"fedjax-lora: interrupted by {signal.Signals(number).name}", file=sys.stderr)
    else:
        resume = ["--resume"] if arguments[0] == "run" and "--resume" not in arguments else []
        command = shlex.join(["fedjax-lora", *arguments, *resume])
        print(f"fedjax-lora: {signal.Signals(number).name}: {saved}; go on with {command}", file=sys.stderr)
    return 128 + number


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """What a user should know is a line on stderr, without the line of code that Python would name.

    A Notice is shown each time; of the programs that JAX can neither read from its cache nor write, the first.
    """
    from fedjax_lora.core.errors import Notice

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        show, troubles = warnings.showwarning, []

        def show_line(message: Warning | str, category: type[Warning], *where: Any, **to: Any) -> None:
            text = " ".join(str(message).split())
            if not issubclass(category, UserWarning):
                show(message, category, *where, **to)
            elif not text.startswith(_CACHE_TROUBLE):
                print(f"fedjax-lora: warning: {text}", file=sys.stderr)
            elif not troubles:
                troubles.append(text)
                print(f"fedjax-lora: warning: {text}; see fedjax-lora cache", file=sys.stderr)

        warnings.showwarning = show_line
        yield


# Each command imports what it needs: `presets` should not wait for JAX.


def _run(options: argparse.Namespace) -> int:
    from fedjax_lora.app.runner import run
    from fedjax_lora.io.plan import apply_plan, effects_of_run, read_plan
    from fedjax_lora.io.run_files import read_metrics
    from fedjax_lora.io.times import sentence
    from fedjax_lora.report.plan import binding, choice
    from fedjax_lora.report.tables import summary_lines

    if options.dry_run or options.target:
        return _dry_run(options)
    start()
    join(options)
    console = console_of(options)
    options.preset = preset_of(options, "digits", console)
    methods = methods_of(options)
    config, path = load_configuration(options, methods), folder_of(options, "runs/{}")
    plan = read_plan(options.plan) if options.plan else None
    if plan:
        config = apply_plan(plan, config, options.plan)
        console.print(f"by the plan: {choice(plan)}")
    summary = run(config, path, options.resume, console, plan, *methods)
    console.print(summary_lines(summary))
    if summary.get("goodput") is not None:  # a trial of a sweep has none
        console.print(sentence(summary))
    if plan:
        console.print(binding(effects_of_run(plan, read_metrics(path))))
    console.print(f"report: {path / 'report.html'}")
    print_document(options, {**summary, "folder": str(path), "report": str(path / "report.html")})
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    from fedjax_lora.app.targets import compile_alone, find

    if not options.dry_run:
        raise ValueError(f"--target is for --dry-run, got {options.target} without it")
    if options.target:
        compile_alone()
    from fedjax_lora.app.dry_run import dry_run
    from fedjax_lora.sim.cohort import use_cpu_cores

    use_cpu_cores()
    console = console_of(options)
    options.preset = preset_of(options, "digits", console)
    methods = methods_of(options)
    config = load_configuration(options, methods)
    found = dry_run(config, find(options.target) if options.target else None, methods.methods)
    for line in found.lines():
        console.print(line)
    print_document(options, found.document())
    return 0 if found.fits else 1


def _plan(options: argparse.Namespace) -> int:
    from fedjax_lora.app.planner import plan
    from fedjax_lora.io import plan as plans
    from fedjax_lora.io.files import check_can_hold_files
    from fedjax_lora.io.run_files import is_run
    from fedjax_lora.report.plan import binding, choice, plan_table, plot_plan

    start()
    console = console_of(options)
    options.preset = preset_of(options, "digits-tsfa", console)
    methods = methods_of(options)
    config, folder = load_configuration(options, methods), folder_of(options, "plans/{}")
    check_can_hold_files(folder)
    if is_run(folder):
        raise ValueError(f"--out {folder} must be a folder for a plan, got that of a run")
    found = plan(config, console, methods=methods.methods)
    folder.mkdir(parents=True, exist_ok=True)
    plans.write_plan(found, folder / plans.NAME)
    plot_plan(found, folder / "plan.png")
    console.print(plan_table(found))
    console.print(binding(plans.effects_of_plan(found)))
    if not found.within_budget:
        over = found.chosen["latency_s"] / found.config["control.latency_budget_s"]
        console.print(
            f"note: rank {found.rank} takes {over:.3g} of control.latency_budget_s, near the least of all ranks"
        )
    command = shlex.join(["fedjax-lora", "run", *again(options), "--plan", str(folder / plans.NAME)])
    console.print(f"{choice(found)}: take it with {command}")
    print_document(options, {**found._asdict(), "folder": str(folder)})
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from fedjax_lora.app.halving import Halving
    from fedjax_lora.app.sweep_folder import sweep_into
    from fedjax_lora.app.sweep_ray import sweep_on_ray
    from fedjax_lora.config.sweeps import grid, overrides, parse_over, product, read_sweep
    from fedjax_lora.report.sweep import check_asked, sweep_table, write_sweep_report

    start()
    console = console_of(options)
    options.preset = preset_of(options, "digits", console)
    methods, path = methods_of(options), folder_of(options, "runs/{}-sweep")
    halving = Halving.parse(options.halving) if options.halving else None
    if not options.sweep and not options.over:
        raise ValueError("sweep must be over something: give --over key=[v1,v2] or --sweep SWEEP.yaml, got neither")
    settings = product(read_sweep(options.sweep) if options.sweep else [{}], grid(parse_over(options.over)))
    check_asked(options.sort, options.target, settings)

    def load(setting: dict[str, Any]) -> "ExperimentConfig":
        return load_configuration(options, methods, overrides(setting))

    if options.ray is None:
        found = sweep_into(path, settings, load, console, methods, halving)
    elif halving is None:
        found = sweep_on_ray(path, settings, options, options.ray, console)
    else:
        raise ValueError(f"--ray must be without --halving, whose trials wait for each other, got {options.halving}")
    console.print(sweep_table(found, options.sort, options.target))
    write_sweep_report(found, path / "report.html", options.target)
    console.print(f"results: {path / 'results.csv'}\nreport: {path / 'report.html'}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from fedjax_lora.io.sweep import read_found
    from fedjax_lora.report.html import check_replaceable, write_report
    from fedjax_lora.report.runs import differing_keys, load_runs
    from fedjax_lora.report.sweep import sweep_table, write_sweep_report
    from fedjax_lora.report.tables import comparison

    console = console_of(options)
    check_replaceable(Path(options.out))
    sweep = read_found(options.runs[0]) if len(options.runs) == 1 else None
    if sweep:
        table = sweep_table(sweep, options.sort, options.target)
        write_sweep_report(sweep, options.out, options.target)
    elif options.sort or options.target is not None:
        raise ValueError("--sort and --target are for the folder of one sweep that has ended, got runs")
    else:
        write_report(options.runs, options.out)
        table = comparison(options.runs)
    console.print(table)
    console.print(f"report: {options.out}")
    runs = load_runs(options.runs)
    keys = differing_keys(runs)
    print_document(
        options,
        [
            {
                "name": run.name,
                "folder": str(run.folder),
                "config": {key: run.config.get(key) for key in keys},
                "summary": run.summary,
            }
            for run in runs
        ],
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from fedjax_lora.app.export import export_run

    export_run(options.run, options.folder, methods_of(options).methods, options.format, options.client)
    console_of(options).print(f"{options.format}: {options.folder}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from fedjax_lora.app.predict import predict_run
    from fedjax_lora.io.files import write_atomically

    start()
    out = Path(options.out) if options.out else None
    if out and out.exists():
        raise ValueError(f"--out must be a new file, got {out}, which is there")
    found = predict_run(options.run, options.file, methods_of(options).methods, options.client)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    text = "".join(f"{line}\n" for line in found.lines(options.json))
    if out:
        write_atomically(out, text)
    else:
        sys.stdout.write(text)
    return 0


def _init(options: argparse.Namespace) -> int:
    from fedjax_lora.config.catalogue import Catalogue
    from fedjax_lora.config.template import commented

    path, methods = Path(options.out), methods_of(options)
    options.preset = preset_of(options, "digits", None)
    text = commented(load_configuration(options, methods), Catalogue.of(methods.methods))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"--out must be a new file, got {path}, which is there") from None
    print(f"configuration: {path}; run it with {shlex.join(['fedjax-lora', 'run', str(path), *named(options)])}")
    return 0


def _keys(options: argparse.Namespace) -> int:
    from fedjax_lora.app.keys import document, listing, select
    from fedjax_lora.config.catalogue import Catalogue
    from fedjax_lora.config.keys import keys

    found = select(keys(Catalogue.of(methods_of(options).methods)), options.pattern)
    if options.json:
        print_document(options, document(found))
    else:
        print(listing(found))
    return 0


def _presets(options: argparse.Namespace) -> int:
    del options
    from fedjax_lora.config.presets import PRESETS

    width = max(map(len, PRESETS))
    for name, description in PRESETS.items():
        print(f"{name:<{width}}  {description}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    from fedjax_lora.data import cache

    found = cache.clear() if options.clear else cache.contents()
    width = max(len(kept.what) for kept in found)
    for kept in found:
        size = f"{len(kept.files)} files, {kept.num_bytes / 1e6:.1f} MB"
        print(f"{kept.what:<{width}}  {size:<22}  {kept.folder}{' cleared' if options.clear else ''}")
    return 0


_COMMANDS = {
    "run": _run,
    "plan": _plan,
    "sweep": _sweep,
    "report": _report,
    "export": _export,
    "predict": _predict,
    "init": _init,
    "keys": _keys,
    "presets": _presets,
    "cache": _cache,
}

if __name__ == "__main__":
    sys.exit(main())
