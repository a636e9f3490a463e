"""Benchmarks of populations, pools and buffered steps at toy size: a result's numbers against each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    """The JSON that a benchmark prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_populations_take_turns_and_say_what_they_hold():
    """Oracles: 24 bytes of each client; the rounds that were asked for; the limits applied to the numbers told."""
    found = run("population.py")
    small, large = found["populations"]
    assert [small["clients"], large["clients"]] == [40, 4000]
    assert large["state_of_clients_bytes"] - small["state_of_clients_bytes"] == 20 * 3960
    assert small["rounds"] == large["rounds"] == 3
    assert found["peak_memory_bytes"] == max(small["peak_memory_bytes"], large["peak_memory_bytes"])
    assert found["holds"]["time"] == (found["round_s_of_largest_over_smallest"] < 1.1)


def test_a_pool_on_the_host_is_on_the_device_in_part():
    """Oracles: the whole pool, and 2 clients of 32 examples of 4 KiB and a label; the losses of both places, equal."""
    found = run("host_pool.py")
    device, host = found["places"]["device"], found["places"]["host"]
    assert device["pool_bytes_on_each_device"] == found["pool_bytes"] > 7_900_000
    assert host["pool_bytes_on_each_device"] == 2 * 32 * 4100
    assert host["train_loss"] == device["train_loss"]
    assert found["round_s_of_host_over_device"] == pytest.approx(
        host["round_s"]["median"] / device["round_s"]["median"]
    )


def test_rounds_and_buffered_steps_have_as_many_updates(tmp_path):
    """Oracle: 2 rounds of 4 clients, less those whose uploads were lost; rates and times by division."""
    found = run("buffered.py", "--figure", tmp_path / "picture.png", "--target", 0.0)
    assert (tmp_path / "picture.png").stat().st_size > 0
    for one in found["runs"].values():
        assert one["client_updates"] == one["rows"][-1]["updates"] == 8
        assert one["client_updates_per_s"] == pytest.approx(8 / one["wall_s"])
        assert one["seconds_to_target"] == one["rows"][0]["simulated_s"] > 0
    first, second = (found["runs"][name]["seconds_to_target"] for name in ("synchronous", "buffered"))
    assert found["times_as_fast_to_target"] == pytest.approx(first / second)
