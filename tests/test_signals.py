"""SIGINT, SIGTERM, a folder in use and a full disk: a run and a sweep stop in one line and go on.

The oracle is the run, or the sweep, that was not disturbed.
"""

import errno
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

import toy
from fedjax_lora.app import cli, runner
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.io import checkpoint, lock, log
from fedjax_lora.sim.trials import Lanes

SETTINGS = [*toy.SETTINGS, "engine.eval_every=2"]


def command(out, *more: str) -> list[str]:
    return ["run", "--quiet", "--out", str(out), *more, "--set", *SETTINGS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The simulation that serves every run, and the folder of one that was left alone."""
    simulation = runner.build(load_config(None, SETTINGS, base=preset("digits")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "build", lambda config, methods: simulation)
        patch.setattr(runner, "write_report", lambda folders, path: path.write_text("report"))
        out = tmp_path_factory.mktemp("runs") / "alone"
        assert cli.main(command(out)) == 0
        yield simulation, out


def same_end(out, alone) -> bool:
    """Whether logs, and models at the end, are equal bit for bit."""
    found = [checkpoint.restore_trained(next(checkpoint.whole(folder / "checkpoints"))) for folder in (out, alone)]
    bits = [[leaf.tobytes() for leaf in checkpoint.jax.tree.leaves(trained.adapters)] for trained in found]
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (out, alone)]
    return logs[0] == logs[1] and bits[0] == bits[1]


def then(segments, number, act):
    """Segments, with something done before the one of this number is given out."""
    for place, segment in enumerate(segments):
        if place == number:
            act()
        yield segment


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_runs_and_says_how_it_goes_on(undisturbed, number, tmp_path, capsys, monkeypatch):
    simulation, alone = undisturbed
    segments, out, before = simulation.segments, tmp_path / "a run", [signal.getsignal(signal.SIGINT)]
    act = lambda: os.kill(os.getpid(), number)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "segments", lambda *given: then(segments(*given), 1, act))
        assert cli.main(command(out)) == 128 + number
    waits, left = capsys.readouterr().err.splitlines()
    name = signal.Signals(number).name
    assert waits.startswith(f"fedjax-lora: {name}: leaves once round 4 of 6 is saved; a second signal leaves at once")
    assert left.startswith(f"fedjax-lora: {name}: saved after round 4 of 6; go on with fedjax-lora run ")
    assert next(checkpoint.whole(out / "checkpoints")).step == 4 and not (out / "summary.json").exists()
    lock.check_unlocked(out)
    assert [signal.getsignal(signal.SIGINT)] == before
    assert cli.main(shlex.split(left.partition("go on with ")[2])[1:]) == 0
    assert same_end(out, alone)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["starts"] == 2 and 0 < summary["goodput"] < 1
    assert summary["spent_s"]["lost"] < 0.1 < 10 * sum(summary["spent_s"].values())


def test_a_signal_before_there_is_anything_to_save_leaves_nothing(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "build", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(command(tmp_path / "run")) == 143
    assert capsys.readouterr().err == "fedjax-lora: interrupted by SIGTERM\n"
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_a_process_whose_main_thread_hears_none():
    """A hash that takes minutes, in C, stands for a program of XLA. Oracle: the exit code, and the two lines."""
    script = """
import hashlib
from fedjax_lora.app.signals import heard
with heard() as signals, signals.ending("round 3"):
    print(flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout and process.stderr and process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("fedjax-lora: SIGTERM: leaves once round 3 is saved")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "fedjax-lora: SIGINT: left at once; what was saved before stays\n"
    process.stdout.close()
    process.stderr.close()


def test_a_folder_in_use_is_one_line(undisturbed, tmp_path, capsys, monkeypatch):
    simulation, _ = undisturbed
    segments, out, codes = simulation.segments, tmp_path / "run", []
    act = lambda: codes.append(cli.main(command(out, "--resume")))  # noqa: E731
    monkeypatch.setattr(simulation, "segments", lambda *given: then(segments(*given), 1, act))
    assert cli.main(command(out)) == 0 and codes == [2]
    assert capsys.readouterr().err == (
        f"fedjax-lora: error: {out} must be a folder that no other process writes to, "
        f"got one in use by process {os.getpid()}\n"
    )


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", [(log.os, "fsync"), (checkpoint, "_hashes")], ids=["log", "checkpoint"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(undisturbed, where, tmp_path, capsys, monkeypatch):
    simulation, alone = undisturbed
    segments, out = simulation.segments, tmp_path / "run"
    with monkeypatch.context() as patch:

        def fill():
            checkpoint_there(out, 2)
            patch.setattr(*where, full)

        patch.setattr(simulation, "segments", lambda *given: then(segments(*given), 1, fill))
        assert cli.main(command(out)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedjax-lora: error: {'checkpoint ' * (where[0] is checkpoint)}{out}")
    assert "cannot be written" in line and "No space left on device" in line
    assert [found.step for found in checkpoint.whole(out / "checkpoints")] == [2]
    assert cli.main(command(out, "--resume")) == 0
    assert same_end(out, alone)


def checkpoint_there(out, step):
    """Wait for the thread that writes it."""
    while step not in checkpoint.steps(out / "checkpoints"):
        pass


def test_a_sweep_saves_its_trials_and_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def sweep(name: str) -> list[str]:
        return [
            "sweep",
            "--quiet",
            "--out",
            str(tmp_path / name),
            "--set",
            *SETTINGS,
            "rounds=4",
            "--over",
            "seed=[0,1]",
        ]

    def digests(name: str) -> list[str]:
        return [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tmp_path.glob(f"{name}/*/metrics.jsonl"))
        ]

    segments = Lanes.segments
    act = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "segments", lambda *given: then(segments(*given), 0, act))
        assert cli.main(sweep("left")) == 143
    waits, left = capsys.readouterr().err.splitlines()
    assert "leaves once the running segment of each trial is saved" in waits
    assert shlex.split(left.partition("go on with ")[2])[1:] == sweep("left")
    trials = [path.parent for path in (tmp_path / "left").glob("*/config.yaml")]
    assert [next(checkpoint.whole(trial / "checkpoints")).step for trial in trials] == [2, 2]
    assert cli.main(sweep("left")) == cli.main(sweep("alone")) == 0
    assert (tmp_path / "left" / "times.jsonl").read_text().count('"start"') == 2
    assert digests("left") == digests("alone") and len(digests("left")) == 2
