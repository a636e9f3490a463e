"""One run on more devices, and in more processes: the same metrics to the last bit where that is asked for."""

import json
import socket
import sys

import pytest

from fedjax_lora.core import hosts
from oracles.processes import SMALL, same_metrics, started


def run(tmp_path, name, processes=1, devices=1, arguments=()):
    """Run SMALL in the folder of this name, in processes that share it."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fedjax_lora.app.cli", "run", str(tmp_path / "small.yaml")]
    command += ["--out", str(tmp_path / name), *arguments]

    def told(number):
        several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
        own = {**several, "JAX_PROCESS_ID": str(number)} if processes > 1 else {}
        return {"JAX_NUM_CPU_DEVICES": str(devices), **own}

    said = started([(command, told(number)) for number in range(processes)])
    lines = [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in said]
    assert lines[0] and not any(lines[1:])  # one alone speaks
    return tmp_path / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), "run")


def test_two_processes_equal_one(alone, tmp_path):
    two = run(tmp_path, "two", processes=2)
    same_metrics(alone, two)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (alone, two)]
    assert summaries[0]["final_accuracy"] == summaries[1]["final_accuracy"]
    assert summaries[1]["device"].startswith("2 x ")


def test_eight_devices_equal_one(alone, tmp_path):
    same_metrics(alone, run(tmp_path, "eight", devices=8))


def test_four_processes_equal_one(alone, tmp_path):
    same_metrics(alone, run(tmp_path, "four", processes=4))


def test_what_two_processes_have_saved_one_goes_on_with(alone, tmp_path):
    run(tmp_path, "run", processes=2, arguments=("--set", "rounds=1"))
    same_metrics(alone, run(tmp_path, "run", arguments=("--resume",)))


def test_a_sum_over_devices_is_the_same_within_float32(tmp_path):
    """Not reproducible: state split over devices, and a mean of their sums; losses to 1e-5, relative."""
    freely = ("--set", "engine.reproducible=false")
    found = [run(tmp_path, f"on-{devices}", devices=devices, arguments=freely) for devices in (1, 4)]
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in found]
    for one, other in zip(*lines, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["latency_s"] == pytest.approx(other["latency_s"], rel=1e-5)
        assert one["participants"] == other["participants"]


@pytest.mark.parametrize(
    ("told", "several"),
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # of a batch script, whose steps are yet to start
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_a_launcher_is_seen_by_what_it_sets(told, several, monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert hosts.launched() is several
