"""The recipes of `launch/`, as far as they go without a cloud."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oracles.processes import SMALL, same_metrics, started

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELLS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_a_shell_file_is_one_and_ends_in_what_every_host_runs(path):
    """Oracle: bash, which reads it without running it."""
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "host.sh" or "launch/host.sh" in path.read_text()


def test_the_manifest_has_what_a_job_set_needs():
    """Oracle: the required fields of JobSet v1alpha2 and of a Job, and chips of the hosts that make up the topology."""
    found = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] and found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    (job,) = found["spec"]["replicatedJobs"]
    of_job = job["template"]["spec"]
    pod = of_job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["name"] and container["name"] and container["image"]
    assert of_job["parallelism"] == of_job["completions"] and of_job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert container["resources"]["limits"]["google.com/tpu"] * of_job["parallelism"] == rows * columns
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][:2] == ["bash", "launch/host.sh"]


def _of_slurm(number: int, port: int) -> dict[str, str]:
    """What `srun --ntasks=2` sets, on one machine; JAX takes the port from the number of the job."""
    return {
        "SLURM_JOB_ID": str(port % 4096),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_STEP_NUM_NODES": "1",
    }


def _of_shell(number: int, port: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }


@pytest.mark.parametrize(("recipe", "told"), [("host.sh", _of_slurm), ("gpu_box.sh", _of_shell)])
def test_two_processes_of_a_recipe_equal_one(recipe, told, tmp_path):
    """Oracle: the run of one process, to the last bit, as the configuration is reproducible."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for count, out in ((1, "one"), (2, "two")):
        command = ["bash", f"launch/{recipe}", str(tmp_path / "small.yaml"), str(tmp_path / out)]
        started([(command, {"PATH": path, **(told(number, port) if count > 1 else {})}) for number in range(count)])
    same_metrics(tmp_path / "one", tmp_path / "two")
