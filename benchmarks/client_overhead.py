"""What a simulated client costs where it learns little: rounds of small clients, beside Flower and pfl-research.

Run as `python benchmarks/client_overhead.py --flower-python PATH --pfl-python PATH`. Each peer runs in the environment
of its python; one that is not given is left out. Each side is a process of its own for every number of clients.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Quiet, Remote, emit, environment, note
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
LEARNING_RATE = 1e-2
CORES = len(os.sched_getaffinity(0))

VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"

QUIETLY = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'peers'}",
}


class Settings(NamedTuple):
    """What a peer's tuning chooses from: processes, PyTorch's threads in each, and whether torch.compile is used."""

    workers: int
    threads: int
    compile: bool


class Peer(NamedTuple):
    """A peer and the python of its environment.

    launcher: starts the workers, where the script does not; it takes their number.
    packages: whose versions are recorded.
    """

    name: str
    python: str
    script: Path
    launcher: tuple[str, ...]
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """What is installed in the environment."""
        command = [self.python, "-c", VERSIONS, *self.packages]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def run(self, settings: Settings, **shape: str | int | float) -> dict[str, Any]:
        """What the peer reports of its rounds; RuntimeError with its last line where it fails."""
        launch = [*self.launcher, str(settings.workers)] if self.launcher and settings.workers > 1 else []
        given = {**shape, **settings._asdict(), "compile": int(settings.compile), "launched": time.time()}
        options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [self.python, *launch, str(self.script), *options]
        done = subprocess.run(command, env=os.environ | QUIETLY, capture_output=True, text=True, check=False)
        reports = [line for line in done.stdout.splitlines() if line.startswith('{"settings"')]
        if done.returncode or len(reports) != 1:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(f"{self.name} ended with exit code {done.returncode}: {''.join(lines[-1:])}")
        return json.loads(reports[0])


def main() -> None:
    """Measure what the command line asks for."""
    options = _parser().parse_args()
    peers = _peers(options)
    result: dict[str, Any] = {
        "benchmark": "client_overhead",
        "environment": environment() | {"peers": {peer.name: peer.versions() for peer in peers}},
        "workload": {
            "steps": options.steps,
            "batch": options.batch,
            "model": "vit-tiny, LoRA of rank 8 on query, value, up and down, a linear head",
            "optimizer": f"adamw, {LEARNING_RATE}",
            "engine": "dense sparsifier, ideal control; its error norms, diagnostics and an evaluation on two images "
            "are inside its times",
        },
        "left_out": [name for name in ("flower", "pfl") if name not in {peer.name for peer in peers}],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["tried"] = {peer.name: _tune(peer, folder, options) for peer in peers}
        chosen = {peer: fastest(result["tried"][peer.name]) for peer in peers}
        result["results"] = [_measure(clients, chosen, folder, options) for clients in options.clients]
    _table(result)
    emit(result, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flower-python", metavar="PATH", help="python of an environment of peers/flower.txt")
    parser.add_argument("--pfl-python", metavar="PATH", help="python of an environment of peers/pfl.txt")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 500, 1000], help="%(default)s")
    parser.add_argument("--steps", type=int, default=2, help="local steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one to warm up (%(default)s)")
    parser.add_argument("--tune-clients", type=int, default=40, help="clients that peers are tuned on (%(default)s)")
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out of the peers' tuning")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")
    return parser


def _peers(options: argparse.Namespace) -> list[Peer]:
    """Those whose python is given."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    table = (
        Peer("flower", options.flower_python, HERE / "peers/flower_rounds.py", (), ("flwr", "ray", "torch", "numpy")),
        Peer("pfl", options.pfl_python, HERE / "peers/pfl_digits.py", torchrun, ("pfl", "torch", "numpy")),
    )
    return [peer for peer in table if peer.python is not None]


def _shape(clients: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a round is, for every side; the pool is written to a file: each client holds what its steps read."""
    path = folder / f"{clients}.npz"
    if not path.exists():
        images, labels = map(np.asarray, load_digits(return_X_y=True))
        rows = np.arange(clients * options.steps * options.batch) % len(labels)
        image = (images[rows].reshape(-1, 8, 8) / 16).astype(np.float32)
        np.savez(path, image=image, label=labels[rows].astype(np.int32))
    return {
        "data": str(path),
        "clients": clients,
        "steps": options.steps,
        "batch": options.batch,
        "learning_rate": LEARNING_RATE,
    }


def _tune(peer: Peer, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of one round at each of a peer's settings, or the error that it ended in."""
    shape = _shape(options.tune_clients, folder, options)
    plain = dict.fromkeys(Settings(*shared, False) for shared in ((CORES, 1), (1, CORES), (1, 1)))
    tried = []
    for settings in [*plain, *([] if options.skip_compile else [Settings(CORES, 1, True)])]:
        try:
            found: dict[str, Any] = {"round_s": min(peer.run(settings, rounds=2, **shape)["round_s"])}
        except RuntimeError as error:
            found = {"error": str(error)}
        tried.append({**settings._asdict(), **found})
        note(f"{peer.name} with {options.tune_clients} clients: {tried[-1]}")
    return tried


def fastest(tried: list[dict[str, Any]]) -> Settings:
    """The settings of the shortest round; RuntimeError where there was none."""
    done = [one for one in tried if "round_s" in one]
    if not done:
        raise RuntimeError(f"a peer ran at none of its settings: {tried[-1]['error']}")
    best = min(done, key=lambda one: one["round_s"])
    return Settings(best["workers"], best["threads"], best["compile"])


def _measure(clients: int, chosen: dict[Peer, Settings], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One number of clients on every side, one side after the other."""
    shape = _shape(clients, folder, options)
    engine = _engine(shape, options.rounds)
    row: dict[str, Any] = {"clients": clients, "engine": engine, "peers": {}}
    note(f"{clients} clients, engine: {engine['median_round_s']:.4g} s a round")
    for peer, settings in chosen.items():
        report = peer.run(settings, rounds=options.rounds, **shape)
        if report["trained_parameters"] != engine["trained_parameters"]:
            counts = engine["trained_parameters"], report["trained_parameters"]
            raise RuntimeError(f"every side must train {counts[0]} parameters, got {counts[1]} in {peer.name}")
        median = statistics.median(report["round_s"])
        report |= {"median_round_s": median, "ratio": median / engine["median_round_s"]}
        row["peers"][peer.name] = report
        note(f"{clients} clients, {peer.name}: {median:.4g} s a round, {report['ratio']:.1f} times the engine's")
    return row


def _engine(shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    """This project's side."""
    with Remote("digits_engine:DigitsEngine", **shape) as engine:
        warm_up_s, first_loss = engine.call("round")
        quiet = Quiet(engine)
        done = [engine.call("round") for _ in range(rounds)]
        return {
            **engine.call("describe"),
            "warm_up_round_s": warm_up_s,
            "round_s": [seconds for seconds, _ in done],
            "median_round_s": statistics.median(seconds for seconds, _ in done),
            "train_loss": [first_loss, *(loss for _, loss in done)],
            "cpu_share_of_others": quiet.share_of_others(),
            "peak_memory_bytes": engine.call("peak_memory_bytes"),
        }


def _table(result: dict[str, Any]) -> None:
    """Seconds of a round, and the ratio of each peer."""
    names = list(result["tried"])
    note("".join(f"{title:>20}" for title in ("clients", "engine", *names)))
    for row in result["results"]:
        cells = [f"{row['clients']}", f"{row['engine']['median_round_s']:.3f} s"]
        for name in names:
            peer = row["peers"][name]
            cells.append(f"{peer['median_round_s']:.3f} s ({peer['ratio']:.1f}x)")
        note("".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
