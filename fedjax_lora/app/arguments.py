"""The arguments of the command line, and their help."""

import argparse
import os
from typing import Any

from fedjax_lora import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The commands, their arguments and their help."""
    parser = _Parser(prog="fedjax-lora", description="Federated LoRA fine-tuning over wireless networks, in JAX.")
    parser.add_argument("--version", action="version", version=f"fedjax-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_run, _plan, _sweep, _report, _export, _predict, _init, _keys, _presets, _cache):
        add(commands)
    return parser


def _run(commands: Any) -> None:
    run = commands.add_parser("run", help="run an experiment", description="Run an experiment.")
    _experiment_arguments(run)
    run.add_argument("--out", metavar="DIR", help="folder of the run; runs/<preset or file name> by default")
    run.add_argument("--plan", metavar="PLAN.json", help="take rank, V and queue from what `fedjax-lora plan` wrote")
    run.add_argument("--resume", action="store_true", help="continue the run that DIR holds")
    run.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that share the run, which a launcher or JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID tell of each other; found without it under Slurm and on TPU slices of "
        "Kubernetes",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing and write nothing: say what a round takes, and whether it fits",
    )
    run.add_argument(
        "--target",
        metavar="DEVICES",
        help="with --dry-run: of devices that are not at hand, such as v5e:2x2, v6e:2x4 or gpu:h100x8",
    )
    _output_arguments(run)


def _plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="choose rank, V and first queue before a run",
        description="Choose the structural rank, and V and queue_s of control.name=tsfa, by a pilot and the channel.",
    )
    _experiment_arguments(plan)
    plan.add_argument("--out", metavar="DIR", help="folder of the plan; plans/<preset or file name> by default")
    _output_arguments(plan)


def _sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run many settings side by side",
        description="Run every combination of the values of some keys, those of one structure in one program; what has "
        "ended is not run again.",
    )
    _experiment_arguments(sweep)
    sweep.add_argument("--out", metavar="DIR", help="folder of the runs; runs/<preset or file name>-sweep by default")
    sweep.add_argument(
        "--over",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b=[v1,v2]",
        help="a key and its values; may be repeated",
    )
    sweep.add_argument(
        "--sweep", metavar="SWEEP.yaml", help="settings as a grid, random draws or a list; beside --over"
    )
    sweep.add_argument(
        "--halving",
        metavar="METRIC[:COST]",
        help="stop the worse half after 1, 2, 4, ... evaluations: by eval_accuracy, eval_loss or personal_accuracy, at "
        "equal rounds, bits or seconds",
    )
    sweep.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run each structure as a task of Ray: local for this machine, or the address of a cluster",
    )
    _sweep_table_arguments(sweep)
    _output_arguments(sweep, has_json=False)


def _report(commands: Any) -> None:
    report = commands.add_parser("report", help="compare runs", description="Write one report over several runs.")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of the runs of a sweep")
    report.add_argument("--out", default="report.html", metavar="FILE", help="report.html by default")
    _sweep_table_arguments(report, "of a sweep: ")
    _output_arguments(report)


def _export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="export adapters or the model", description="Export a run's adapters, or its whole model."
    )
    export.add_argument("run", metavar="RUN", help="folder of a run")
    export.add_argument("folder", metavar="DIR", help="new folder to write to")
    export.add_argument(
        "--format",
        default="peft",
        metavar="NAME",
        help="peft (default), a folder for PeftModel; or merged, the whole model for transformers",
    )
    export.add_argument("--client", type=int, metavar="N", help="a client's own adapters, counted from 0")
    _methods_argument(export)
    _output_arguments(export, has_json=False)


def _predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="label new texts or images",
        description="Apply what a run has trained to new texts or images: a line for each, with label and probability, "
        "with a number, or with the perplexity of a text or of a response.",
    )
    predict.add_argument("run", metavar="RUN", help="folder of a run")
    predict.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help="a text in each line; or .csv, .tsv, .jsonl or .parquet with the columns of the training data; - (the "
        "default) reads lines from stdin; of a run on images, an image or a folder of images",
    )
    predict.add_argument("--out", metavar="FILE", help="new file to write to; stdout by default")
    predict.add_argument("--client", type=int, metavar="N", help="by a client's own adapters, counted from 0")
    _methods_argument(predict)
    predict.add_argument("--json", action="store_true", help="print a JSON object for each")


def _init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write a configuration to begin with",
        description="Write a configuration with every key in use, and what each means, in comments.",
    )
    init.add_argument("--preset", metavar="NAME", help="start from a preset (see `fedjax-lora presets`)")
    init.add_argument("--out", metavar="FILE", default="experiment.yaml", help="new file; experiment.yaml by default")
    _overrides_argument(init)
    _methods_argument(init)
    init.set_defaults(config=None)


def _keys(commands: Any) -> None:
    keys = commands.add_parser(
        "keys",
        help="list the keys of a configuration",
        description="List the keys of a configuration: type, default, whether it sweeps in one program, and meaning.",
    )
    keys.add_argument("pattern", nargs="?", metavar="PATTERN", help="a part of the keys, or a pattern: control.*")
    _methods_argument(keys)
    keys.add_argument("--json", action="store_true", help="print one JSON document")


def _presets(commands: Any) -> None:
    commands.add_parser("presets", help="list the presets", description="List the presets.")


def _cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="show or clear what is kept on disk",
        description="Show what is kept on disk so that a second run starts fast: compiled programs, tokens, models.",
    )
    cache.add_argument("--clear", action="store_true", help="remove it; other files in its folder stay")


def _sweep_table_arguments(parser: argparse.ArgumentParser, of: str = "") -> None:
    parser.add_argument(
        "--sort", metavar="COLUMN", help=f"{of}sort the table by a column of results.csv, best first; by accuracy else"
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="ACCURACY",
        help=f"{of}count rounds, bits and seconds until this accuracy; 0.95 of the best of all trials by default",
    )


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="what differs from the defaults or the preset")
    parser.add_argument("--preset", metavar="NAME", help="start from a preset (see `fedjax-lora presets`)")
    _overrides_argument(parser)
    _methods_argument(parser)


def _overrides_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b=value",
        dest="overrides",
        help="override a key; may be repeated",
    )


def _methods_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file, or a module, with methods of your own in METHOD or METHODS; it is run; may be repeated",
    )


def _output_arguments(parser: argparse.ArgumentParser, has_json: bool = True) -> None:
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings alone")
    if has_json:
        parser.add_argument("--json", action="store_true", help="print one JSON document; all else goes to stderr")
    parser.set_defaults(json=False)


def take_files(options: argparse.Namespace) -> None:
    """A configuration file that follows the values of --set or --over is CONFIG.yaml: argparse takes it for a value.

    Raises:
      ValueError: there are two.
    """
    files = [options.config] if getattr(options, "config", None) else []
    for name in ("overrides", "over"):
        values = getattr(options, name, [])
        files += filter(_is_file, values)
        values[:] = [value for value in values if not _is_file(value)]
    if len(files) > 1:
        raise ValueError(f"CONFIG.yaml must be one file, got {' and '.join(files)}")
    options.config = next(iter(files), None)


def _is_file(value: str) -> bool:
    return os.path.isfile(value) or ("=" not in value and value.endswith((".yaml", ".yml")))
