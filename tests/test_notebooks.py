"""The notebooks run as they stand, at a small size. Oracle: what their cells say of their shapes."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SMALL = {
    "sweep.ipynb": {
        "CLIENTS, ROUNDS": "3, 1",
        "POWERS_DBM": "[0, 8]",
        "BUDGETS_S": "[10, 100]",
    }
}
"""Notebook -> name that its first cell assigns -> value for the test."""


def cells(name):
    """Its code, cell by cell, with the small sizes in the first."""
    held = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in held if cell["cell_type"] == "code"]
    for names, value in SMALL[name].items():
        code[0], found = re.subn(rf"^{names} = .*$", f"{names} = {value}", code[0], flags=re.MULTILINE)
        assert found == 1, names
    return code


def test_every_notebook_is_run():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name):
    matplotlib.use("agg")
    scope = {}
    for cell in cells(name):
        exec(compile(cell, name, "exec"), scope)
    trials = scope["trials"]
    assert trials.metrics.eval_accuracy.shape == (4, 1) and len(scope["table"]["round"]) == 4
    assert [shown.shape for shown in scope["shown"].values()] == [(2, 2), (2, 2)]
    scope["plt"].close("all")
