"""A sweep on Ray, in processes of this machine."""

import csv
import json
import sys
from pathlib import Path

import pytest

from oracles.processes import SMALL, started

pytest.importorskip("ray", reason="ray is not installed: the extra `ray` installs it")

OWN = """
import dataclasses, os, signal
from pathlib import Path
from typing import Literal
from fedjax_lora.methods import Method
from fedjax_lora.sparsifiers import dense

MARK = Path(__file__).with_name("killed")

@dataclasses.dataclass(frozen=True, kw_only=True)
class Fails(dense.DenseConfig):
    name: Literal["fails"] = "fails"

@dataclasses.dataclass(frozen=True, kw_only=True)
class Dies(dense.DenseConfig):
    name: Literal["dies"] = "dies"

def fails(options, context):
    raise RuntimeError("on purpose")

def dies(options, context):
    if not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return dense.make(options, context)

METHODS = [Method("sparsifier", "fails", Fails, fails), Method("sparsifier", "dies", Dies, dies)]
"""


def test_one_that_fails_stops_no_other_and_one_that_is_killed_is_tried_again(tmp_path):
    """Eight structures: seven results, one failure that says why; a second start runs nothing again."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL | {"rounds": 1}))
    names = ["dense", "fails", "dies", "soft", "top_k", "random_rank"]
    command = [sys.executable, "-m", "fedjax_lora.app.cli", "sweep", str(tmp_path / "small.yaml")]
    command += ["--methods", str(tmp_path / "own.py"), "--ray", "local", "--out", str(tmp_path / "sweep")]
    sweep = tmp_path / "sweep.json"
    settings = [{"sparsifier.name": name} for name in names] + [{"local.steps": 2}, {"local.batch_size": 2}]
    sweep.write_text(json.dumps({"list": settings}))
    command += ["--sweep", str(sweep)]
    started([(command, {})])
    with (tmp_path / "sweep" / "results.csv").open() as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    failed = [name for name, row in rows.items() if row["status"] == "refused"]
    assert len(rows) == 8 and len(failed) == 1 and "fails" in failed[0]
    assert (tmp_path / "killed").exists()  # a worker was, and its trial has ended
    ended = {name: row for name, row in rows.items() if row["status"] == "ended"}
    assert len(ended) == 7 and all(row["rounds"] == "1" and row["final_accuracy"] for row in ended.values())
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert told["reasons"][failed[0]] == "failed: RuntimeError: on purpose"

    times = {name: Path(tmp_path / "sweep" / name / "metrics.jsonl").stat().st_mtime_ns for name in ended}
    started([(command, {})])
    assert times == {name: Path(tmp_path / "sweep" / name / "metrics.jsonl").stat().st_mtime_ns for name in ended}
