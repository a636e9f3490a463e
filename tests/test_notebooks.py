"""The notebooks run as they stand, at a small size. Oracle: what their cells say of their shapes."""

import json
import re
from pathlib import Path

import matplotlib

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SMALL = {
    "sweep.ipynb": {
        "CLIENTS, ROUNDS": "3, 1",
        "POWERS_DBM": "[0, 8]",
        "BUDGETS_S": "[10, 100]",
    },
    "split_or_not.ipynb": {
        "CLIENTS, ROUNDS": "3, 1",
        "BANDS_HZ": "[2e5, 5e6]",
        "CYCLES": "[1e6, 1e9]",
        "TARGET": "0.1",
    },
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


def run(name):
    """What the names of a notebook stand for at its end."""
    matplotlib.use("agg")
    scope = {}
    for cell in cells(name):
        exec(compile(cell, name, "exec"), scope)
    return scope


def test_the_notebook_of_sweeps_runs():
    scope = run("sweep.ipynb")
    trials = scope["trials"]
    assert trials.metrics.eval_accuracy.shape == (4, 1) and len(scope["table"]["round"]) == 4
    assert [shown.shape for shown in scope["shown"].values()] == [(2, 2), (2, 2)]
    scope["plt"].close("all")


def test_the_notebook_of_split_training_runs():
    """By hand: splitting is sooner where computing takes longest; bits do not depend on the cell."""
    scope = run("split_or_not.ipynb")
    assert scope["trials"].metrics.eval_accuracy.shape == (8, 1) and scope["advantage"].shape == (2, 2)
    assert scope["advantage"][1, 1] == scope["advantage"].max() > 0
    assert (scope["bits"] == scope["bits"][:, :1, :1]).all()
    scope["plt"].close("all")
