"""The benchmark of language models at toy size: what PyTorch says of the exports against the run's own log."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oracles.toy_bert import WORDS

pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
SIZES = {"clients": 3, "rounds": 3, "steps": 2, "batch": 4, "layers": 1, "width": 16, "eval-every": 1}


@pytest.mark.parametrize(("family", "form"), [("llama", "instruction"), ("gpt2", "plain")])
def test_pytorch_finds_the_perplexity_of_the_run_in_its_exports(tmp_path, family, form):
    """Oracle: PyTorch and PEFT, from the exported folders and the texts; and the JSON's own arithmetic."""
    text, random = tmp_path / "text.tsv", np.random.default_rng(0)
    lines = (f"{' '.join(random.choice(WORDS, random.integers(1, 9)))}\t{random.integers(2)}\n" for _ in range(60))
    text.write_text("".join(lines))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, str(ROOT / "benchmarks" / "causal_lm.py"), "--text", str(text), *sizes]
    command += ["--families", family, "--forms", form]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (found,) = result["runs"].values()
    ours = found["perplexity"]["run"]
    assert ours == found["perplexity_by_round"]["3"] and len(found["perplexity_by_round"]) == 3
    for export in ("peft", "merged"):
        assert found["perplexity"][export] == pytest.approx(ours, rel=1e-4)
        assert found["relative_difference"][export] == pytest.approx(abs(found["perplexity"][export] / ours - 1))
    assert found["train_loss"][-1] < found["train_loss"][0]
    assert result["check"]["agrees"] and result["check"]["loss_fell"]
