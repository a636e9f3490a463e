"""A sweep that is killed. Oracle: the same sweep left alone."""

import csv
import signal
import subprocess
import sys
import time

import pytest

TIMES = {"wall_s", "compile_s"}
COMMAND = [
    *(sys.executable, "-m", "fedjax_lora.app.cli", "sweep", "--preset", "digits", "--quiet"),
    *("--set", "rounds=6", "engine.eval_every=1", "clients.count=200", "local.steps=1", "lora.targets=[query]"),
    *("--over", "seed=[0,1,2,3,4,5,6,7]", "control.keep_ratio=[0.25,0.5]"),
]


def rows(path):
    with (path / "results.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def rounds_done(path):
    """Lines of all logs."""
    return sum(log.read_bytes().count(b"\n") for log in path.glob("*/metrics.jsonl"))


@pytest.mark.slow
def test_a_sweep_killed_five_times_ends_as_one_that_was_not(tmp_path):
    """200 clients, 16 trials: `results.csv` is the same but for its times, to the last digit."""
    subprocess.run([*COMMAND, "--out", str(tmp_path / "alone")], check=True)
    out, kills = tmp_path / "killed", 0
    while kills < 5:
        process, before = subprocess.Popen([*COMMAND, "--out", str(out)]), rounds_done(out)
        while process.poll() is None and rounds_done(out) < before + 5:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run([*COMMAND, "--out", str(out)], check=True)
    assert rows(out) == rows(tmp_path / "alone")
