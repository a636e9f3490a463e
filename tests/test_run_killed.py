"""A run that is killed, again and again. The oracle is the run that was not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_lora.io import checkpoint
from toy import SETTINGS

RUN = [sys.executable, "-m", "fedjax_lora.app.cli", "run", "--quiet", "--set", *SETTINGS, "engine.eval_every=1"]
ROUNDS = 1000
OURS = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS")


def start(out: Path, rounds: int) -> subprocess.Popen[bytes]:
    """A run of many rounds is as a user has it: all cores, all of XLA."""
    resume = ["--resume"] if (out / "config.yaml").exists() else []
    environment = {name: value for name, value in os.environ.items() if rounds < ROUNDS or name not in OURS}
    command = [*RUN, f"rounds={rounds}", "--out", str(out), *resume]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def is_saving(out: Path, pid: int) -> bool:
    return out.exists() and any(name.endswith(f".partial-{pid}") for name in os.listdir(out / "checkpoints"))


def wait_until(happened, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def newest(out: Path) -> int:
    return max(checkpoint.steps(out / "checkpoints"), default=0)


def disturb(out: Path, rounds: int, number: signal.Signals, moments) -> None:
    """Send a signal to a run and start it again, once for each of the moments.

    A moment is seconds after the start; or, below zero, after its first checkpoint; or "saving", in the midst of
    the second.
    """
    for moment in moments:
        process, before = start(out, rounds), newest(out)
        if moment == "saving" or moment < 0:
            wait_until(lambda before=before: newest(out) > before, process)
        if moment == "saving":
            wait_until(lambda process=process: is_saving(out, process.pid), process)
        else:
            time.sleep(abs(moment))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(number)
        assert process.wait(600) in {-number, 128 + number}


def finish(out: Path, rounds: int) -> tuple[bytes, list[bytes]]:
    """Run to the end; the log, and the bits of the model."""
    assert start(out, rounds).wait(900) == 0
    assert (out / "summary.json").exists() and not list(out.glob("checkpoints/.*"))
    trained = checkpoint.restore_trained(next(checkpoint.whole(out / "checkpoints")))
    assert trained.round == rounds
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((trained.adapters, trained.clients))]
    return (out / "metrics.jsonl").read_bytes(), bits


def test_a_run_killed_twice_once_while_it_saves_ends_as_one_that_was_not(tmp_path):
    disturb(tmp_path / "killed", 40, signal.SIGKILL, ["saving", -0.05])
    assert finish(tmp_path / "killed", 40) == finish(tmp_path / "alone", 40)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("runs") / "alone", ROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 50), (signal.SIGTERM, 20)])
def test_a_run_that_is_killed_at_random_ends_as_one_that_was_not(number, times, alone, tmp_path):
    """A third of the times while it saves, a third soon after a save, a third wherever, imports included."""
    chance = random.Random(times)
    ways = [lambda: "saving", lambda: -chance.uniform(0.0, 0.3), lambda: chance.uniform(0.0, 5.0)]
    moments = [ways[place % 3]() for place in range(times)]
    disturb(tmp_path / "killed", ROUNDS, number, moments)
    assert finish(tmp_path / "killed", ROUNDS) == alone
