"""What tasks measure, and runs whose task has no accuracy, in reports. The oracle is the log that was written."""

import math

import pytest

from fedjax_lora.core.progress import standing
from fedjax_lora.report import plots
from fedjax_lora.report.cells import results
from fedjax_lora.report.plots import all_plots
from fedjax_lora.report.runs import load_runs
from fedjax_lora.report.sweep_tables import check_sort, table_of
from fedjax_lora.report.tables import comparison, summary_lines, summary_rows
from report.folders import ROUNDS, write_run, write_sweep

PEARSON = [None, 0.1, None, 0.5, None, 0.7]
NO_ACCURACY = {"eval_accuracy": [None] * ROUNDS, "task/pearson": PEARSON}


def regression(folder, **more):
    return write_run(folder, summary={"initial_accuracy": None}, **NO_ACCURACY, **more)


@pytest.fixture
def drawn(monkeypatch):
    """Plots as their titles and the lines of each run."""
    found = {}
    monkeypatch.setattr(plots, "draw", lambda title, x, y, names, lines: found.update({title: lines}))

    def lines_of(runs):
        all_plots(runs)
        return found

    return lines_of


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_an_accuracy_is_told_by_its_loss_and_what_its_task_measures(tmp_path, ended):
    (run,) = load_runs([regression(tmp_path / "run", ended=ended)])
    rows = dict(summary_rows([run]))
    assert [cell.text for cell in rows["final test loss"] + rows["pearson"]] == ["0.25", "0.7"]
    assert not [label for label in rows if "accuracy" in label]
    lines = summary_lines(run.summary).splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["final test loss", "pearson"]
    assert run.summary["task/pearson"] == 0.7 and run.summary["final_accuracy"] is None


def test_it_is_drawn_by_its_loss_and_what_its_task_measures(tmp_path, drawn):
    found = drawn(load_runs([regression(tmp_path / "run")]))
    assert not [title for title in found if "Accuracy" in title]
    ((line,),) = found["Pearson"]
    assert (line.x, line.y) == ([2, 4, 6], [0.1, 0.5, 0.7])
    assert found["Loss"][0][0].y == [0.25] * 3


def test_what_only_one_of_the_runs_measures_stands_beside_their_accuracies(tmp_path, drawn):
    columns = {"task/macro_f1": [None, 0.2, None, 0.3, None, 0.4]}
    runs = load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", **columns)])
    rows = dict(summary_rows(runs))
    assert [cell.text for cell in rows["macro f1"]] == ["–", "0.4"]
    labels = list(rows)
    assert labels.index("final accuracy") < labels.index("macro f1") < labels.index("rounds")
    assert "macro f1" in comparison([tmp_path / "a", tmp_path / "b"])
    found = drawn(runs)
    assert [line.y for (line,) in found["Macro f1"]] == [[], [0.2, 0.3, 0.4]]
    assert "Accuracy by round" in found


def test_a_sweep_without_an_accuracy_is_sorted_by_its_loss(tmp_path):
    losses = {1: 0.5, 2: 0.25, 3: 0.75}
    trials = [
        ({"V": v}, "ended", {**NO_ACCURACY, "eval_loss": [None, 1.0, None, 0.9, None, loss]})
        for v, loss in losses.items()
    ]
    found = results(write_sweep(tmp_path, trials))
    assert found.measure == "final_loss" and found.of_line == "eval_loss" and found.target is None
    table = table_of(found)
    assert [cell.setting["V"] for cell in table.cells] == [2, 1, 3]
    assert table.heads[:3] == ["V", "trials", "final test loss"] and "final accuracy" not in table.heads
    check_sort("final_loss", [{"V": 1}])
    with pytest.raises(ValueError, match=r"^target must not be given where no accuracy is measured, got 0.5$"):
        results(write_sweep(tmp_path / "asked", trials), target=0.5)


def test_an_evaluation_in_a_word_by_hand():
    assert standing(0.5, 0.25, " before:") == "accuracy before: 0.2500"
    assert standing(0.5, math.nan, " before:") == "test loss before: 0.5000"
    assert standing(0.5, math.nan) == "test loss 0.5000"
    assert standing(math.nan, math.nan) == "accuracy not measured"
    assert standing(0.5, 1.65, " before:", "perplexity") == "perplexity before: 1.6500"
