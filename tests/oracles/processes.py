"""Runs in processes of their own, which share them or not."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "rounds": 2,
    "pretrain": {"steps": 2},
    "clients": {"count": 4, "partition": {"alpha": 1.0}},
    "lora": {"max_rank": 4, "rank": 3, "targets": ["query"]},
    "local": {"steps": 1, "batch_size": 4},
    "engine": {"eval_every": 1, "client_chunk": 1, "reproducible": True},
}
"""A configuration that is quick to compile and whose bits do not depend on devices."""

TIMEOUT_S = 600


WAITING = {"NPROC": "32"}
"""Threads of XLA: eight devices on fewer cores would wait for each other for want of them."""


def started(each: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[str]:
    """Run commands side by side, each with this beside the environment and one device; what each said on stdout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": path, **WAITING, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own in each
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


def same_metrics(one: Path, other: Path) -> None:
    """Fail unless two runs have logged the same, to the last digit."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert lines[0] and lines[0] == lines[1]
