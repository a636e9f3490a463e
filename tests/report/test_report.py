"""Reports and tables: the log's own values, whatever is missing in it. The oracle is the log that was written."""

import hashlib
import json
from xml.etree import ElementTree

import pytest

from fedjax_lora.app.cli import main
from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io.log import RunFolder
from fedjax_lora.report import drawing
from fedjax_lora.report.formats import MISSING
from fedjax_lora.report.html import check_replaceable, write_report
from fedjax_lora.report.plots import _accuracy, _column, all_plots
from fedjax_lora.report.runs import differing_keys, load_runs
from fedjax_lora.report.tables import comparison, summary_lines, summary_rows
from report.folders import ROUNDS, write_run

PLOTS = 12
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Plots without content; `test_plots.py` looks at the real ones."""
    monkeypatch.setattr(drawing, "_svg", lambda figure, title: '<svg xmlns="http://www.w3.org/2000/svg"/>')


class Page:
    """The parts of a page, whose body is read as XML: strictly, so that nothing unescaped gets by."""

    def __init__(self, text):
        self.head, _, body = text.partition("<body>")
        self.body = ElementTree.fromstring(f"<body>{body.partition('</body>')[0]}</body>")
        self.tables = [
            [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
            for table in self.body.iter("table")
        ]
        self.rows = self.tables[0]
        self.plots = len(list(self.body.iter(f"{SVG}svg")))
        self.legends = [self.texts("li", legend) for legend in self.classed("legend")]
        self.notes = ["".join(note.itertext()) for note in self.classed("note") if note.tag == "p"]
        self.exact = {"".join(cell.itertext()): cell.get("title") for cell in self.body.iter("td") if cell.get("title")}

    def classed(self, name):
        return [element for element in self.body.iter() if name in element.get("class", "").split()]

    def texts(self, tag, within=None):
        return ["".join(element.itertext()) for element in (self.body if within is None else within).iter(tag)]


def render(folders, out):
    """The page of the report that is written to `out`."""
    write_report(folders, out)
    return Page(out.read_text())


def test_a_report_of_one_run_shows_the_values_of_its_log(tmp_path):
    page = render([write_run(tmp_path / "run")], tmp_path / "report.html")
    cells = {row[0]: row[1] for row in page.rows}
    assert cells == {
        "": "run",
        "initial accuracy": "0.1000",
        "final accuracy": f"{6 / 7:.4f}",
        "best accuracy": f"{6 / 7:.4f}",
        "rounds": "6",
        "simulated time, s": "9",
        "latency a round, s": "1.5",
        "uplink": "6 Gbit",
        "downlink": "42 bit",
        "participants a round": "3.5",
        "absent weight a round": "0.5",
        "wall time, s": "12.5",
        "of it compiling, s": "2",
        "samples/s": MISSING,
        "peak memory": "2.048 kB",
        "device": "1 x cpu",
        "versions": "jax 0.10",
        "partition": "abc",
    }
    assert page.exact == {"6 Gbit": f"{6 * 10**9 + 15:,} bits", "2.048 kB": "2,048 bytes"}
    assert page.plots == PLOTS


def test_whatever_stands_in_a_run_is_text_on_its_page_oracle_xml_parser(tmp_path):
    nasty = '<script>alert("&")</script>'
    folders = [
        write_run(tmp_path / f"<b>{i}&", {"seed": i, "model": {"pretrained": nasty}}, summary={"warnings": [nasty]})
        for i in range(2)
    ]
    page = render(folders, tmp_path / "report.html")
    assert not {"script", "b"} & {e.tag for e in page.classed("scroll")[0].iter()} and not page.texts("script")
    assert page.texts("h1") == ["<b>0&, <b>1&"] and page.rows[0] == ["", "<b>0&", "<b>1&"]
    assert [page.texts("li", box) for box in page.classed("warning")] == [[nasty]] * 2
    assert ["model.pretrained", nasty, nasty] in page.tables[-1]


def test_several_runs_stand_side_by_side_with_the_keys_in_which_they_differ(tmp_path):
    configs = [{"seed": 0, "lora": {"rank": r, "alpha": 16.0}} for r in (4, 8)]
    folders = [write_run(tmp_path / f"rank <{i}>", config) for i, config in enumerate(configs)]
    page = render(folders, tmp_path / "report.html")
    assert page.rows[0] == ["", "rank <0>", "rank <1>"]
    assert page.rows[1] == ["lora.rank", "4", "8"]
    assert not [row for row in page.rows if row[0] == "lora.alpha"]
    assert page.plots == PLOTS


def test_runs_of_one_name_go_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"), write_run(tmp_path / "c")]
    assert [run.name for run in load_runs(folders)] == [str(folders[0]), str(folders[1]), "c"]


def test_the_folder_of_a_sweep_stands_for_its_runs_by_name(tmp_path):
    alone = write_run(tmp_path / "alone")
    for name in ("seed=1", "seed=0"):
        write_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "report.html").touch()
    assert [run.name for run in load_runs([alone, tmp_path / "sweep"])] == ["alone", "seed=0", "seed=1"]


def test_differing_keys_counts_a_key_that_one_run_lacks_oracle_by_hand(tmp_path):
    folders = [write_run(tmp_path / "a", {"x": 1, "y": 2}), write_run(tmp_path / "b", {"x": 1, "z": None, "w": 3})]
    assert differing_keys(load_runs(folders)) == ["y", "w"]


@pytest.mark.parametrize(
    ("columns", "plots", "note"),
    [
        ({"cumulative_latency_s": [None] * ROUNDS, "latency_s": [None] * ROUNDS}, PLOTS - 2, "unbounded"),
        ({"cumulative_latency_s": [0.0] * ROUNDS}, PLOTS - 1, "no simulated time"),
        ({"sparsification_error": [None] * ROUNDS, "covariance_error": [None] * ROUNDS}, PLOTS - 1, "Not measured"),
        ({"dropped_energy": [None] * ROUNDS}, PLOTS - 1, "Not measured"),
        ({"eval_loss": [None] * ROUNDS}, PLOTS, None),
        ({"train_loss": [None, 1.0, None, None, 2.0, 3.0]}, PLOTS, None),
        ({"cumulative_latency_s": [1.0, 2.0] + [None] * 4}, PLOTS, None),
    ],
)
def test_values_that_are_missing_leave_a_note_where_nothing_is_left_to_draw(tmp_path, columns, plots, note):
    page = render([write_run(tmp_path / "run", **columns)], tmp_path / "report.html")
    assert page.plots == plots
    assert len(page.notes) == PLOTS - plots
    assert note is None or any(note in text for text in page.notes)


def test_a_run_that_has_not_ended_is_told_by_its_metrics(tmp_path):
    path = write_run(tmp_path / "run", ended=False)
    rows = dict(summary_rows(load_runs([path])))
    assert rows["final accuracy"] == [(f"{6 / 7:.4f}", "")]
    assert rows["initial accuracy"] == rows["wall time, s"] == [(MISSING, "")]
    assert render([path], tmp_path / "report.html").plots == PLOTS


def test_comparison_of_many_runs_in_the_terminal_has_one_line_a_run(tmp_path):
    folders = [write_run(tmp_path / f"[red]{x}", {"x": x}) for x in [*range(9), None]]
    lines = comparison(folders).splitlines()
    rows = [next(line.split() for line in lines if f"[red]{x}" in line) for x in (1, None)]
    accuracy = f"{6 / 7:.4f}"
    assert rows[0] == ["[red]1", "1", "0.1000", accuracy, accuracy, "6", "9", "1.5", "6", "Gbit"]
    assert rows[1][1] == MISSING
    assert max(map(len, lines)) < 160


def test_comparison_of_few_runs_in_the_terminal_has_one_column_a_run(tmp_path):
    folders = [write_run(tmp_path / "[red]", {"x": 1}), write_run(tmp_path / "b", {"x": None})]
    rows = {line.split()[0]: line.split()[-2:] for line in comparison(folders).splitlines() if line.strip("─ ")}
    assert rows["run"] == ["[red]", "b"] and rows["x"] == ["1", MISSING] and rows["final"] == [f"{6 / 7:.4f}"] * 2


def test_summary_lines_show_the_headline_of_a_summary(tmp_path):
    summary = load_runs([write_run(tmp_path / "run")])[0].summary
    assert summary_lines(summary).splitlines() == [
        "initial accuracy    0.1000",
        "final accuracy      0.8571",
        "best accuracy       0.8571",
        "rounds              6",
        "simulated time, s   9",
        "latency a round, s  1.5",
        f"uplink              6 Gbit ({6 * 10**9 + 15:,} bits)",
    ]


def test_personal_accuracy_stands_beside_the_global_one_where_a_run_has_it(tmp_path):
    personal = [None, 0.5, None, 0.625, None, 0.75]
    folders = [write_run(tmp_path / "fedsa", personal_accuracy=personal), write_run(tmp_path / "fedit")]
    runs = load_runs(folders)
    assert dict(summary_rows(runs))["personal accuracy"] == [("0.7500", ""), (MISSING, "")]
    assert "personal accuracy   0.7500" in summary_lines(runs[0].summary)
    assert "personal accuracy" not in summary_lines(runs[1].summary)
    assert "personal accuracy" in comparison(folders) and "personal accuracy" not in comparison(folders[1:])
    with_own, without = ([key.label for key in all_plots([run])[0].legend] for run in runs)
    assert with_own == ["global", "clients' own"] and without == ["test accuracy"]
    # Oracle: a line's points are those of the log; the second begins with the first round that measured it.
    lines = _accuracy(runs[0], _column(runs[0], "round"))
    assert (lines[1].x, lines[1].y) == ([2, 4, 6], [0.5, 0.625, 0.75])


def test_folders_that_are_no_runs_are_one_line_errors(tmp_path):
    empty = RunFolder.create(tmp_path / "empty", "seed: 0", {}).path
    run = write_run(tmp_path / "run")
    out = tmp_path / "report.html"
    absent = tmp_path / "absent"
    for folders, word in [([empty], "at least one round"), ([absent], "folder of a run"), ([], "at least one")]:
        with pytest.raises(ValueError, match=word) as caught:
            write_report([run, *folders] if folders else [], out)
        assert "\n" not in str(caught.value)
    assert not out.exists()
    with pytest.raises(ValueError, match="can be written"):
        write_report([run], absent / "report.html")


def test_what_was_run_stands_under_the_title_and_its_configuration_below(tmp_path):
    """Oracle: the configurations that were written."""
    configs = [
        {"seed": 3, "rounds": 9, "control": {"name": "fixed", "keep_ratio": ratio}, "local": {"steps": 10}}
        for ratio in (0.25, 0.5)
    ]
    folders = [write_run(tmp_path / f"run{i}", config) for i, config in enumerate(configs)]
    page = render(folders[:1], tmp_path / "report.html")
    assert page.texts("p")[0] == "control fixed, keep ratio 0.25 training 9 rounds seed 3"
    page = render(folders, tmp_path / "report.html")
    assert page.texts("p")[0] == "control fixed training 9 rounds seed 3"
    chosen, every = page.tables[1:]
    assert [row[0] for row in every[1:]] == ["control.keep_ratio", "control.name", "local.steps", "rounds", "seed"]
    assert chosen[1:] == [["control.keep_ratio", "0.25", "0.5"], ["rounds", "9", "9"], ["seed", "3", "3"]]
    assert len(page.classed("differs")) == 2 and page.texts("details") and not page.body.findall(".//details[@open]")


def test_every_plot_has_a_legend_and_a_long_one_ends_in_a_note(tmp_path):
    folders = [write_run(tmp_path / f"run{i}", {"seed": i}) for i in range(12)]
    page = render(folders[:1], tmp_path / "report.html")
    assert len(page.legends) == page.plots and all(page.legends)
    page = render(folders, tmp_path / "report.html")
    assert page.legends[0] == [*(f"seed {i}" for i in range(8)), "and 4 more, coloured as in the table"]
    loss = page.legends[3]
    assert loss == ["test", "training", *(f"seed {i}" for i in range(6)), "and 6 more, coloured as in the table"]


def test_the_latency_budget_is_a_headline_number_and_lost_rounds_are_told_oracle_the_summary(tmp_path):
    measured = {"latency_budget_s": 0.5, "latency_over_budget": 33.4444, "final_queue_s": 1234.5678}
    summary = measured | {"lost_rounds": 2, "diverged_rounds": 0}
    plain = write_run(tmp_path / "plain", summary={"lost_rounds": 0, "latency_budget_s": None})
    late = write_run(tmp_path / "late", summary=summary)
    lines = summary_lines(load_runs([late])[0].summary).splitlines()
    assert "latency budget, s         0.5" in lines
    assert "mean latency over budget  33.44× (33.4444×)" in lines
    assert "queue at the end, s       1,235 (1,234.5678)" in lines
    assert "lost rounds               2" in lines and "diverged" not in "".join(lines)
    rows = {row[0]: row[1:] for row in render([plain, late], tmp_path / "report.html").rows}
    assert rows["mean latency over budget"] == [MISSING, "33.44×"] and rows["lost rounds"] == ["0", "2"]
    headline = summary_lines(load_runs([plain])[0].summary)
    assert "budget" not in headline and "queue" not in headline and "lost" not in headline


def test_a_run_that_has_not_ended_takes_its_budget_from_the_configuration_oracle_by_hand(tmp_path):
    config = {"control": {"name": "tsfa", "latency_budget_s": 0.5}}
    (run,) = load_runs([write_run(tmp_path / "run", config, ended=False)])
    assert dict(summary_rows([run]))["mean latency over budget"] == [("3×", "")]


def test_a_log_that_changed_since_the_run_ended_is_one_line(tmp_path):
    path = write_run(tmp_path / "run")
    log = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(log.replace("0.25", "0.75", 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl must be as it was when the run ended"):
        load_runs([path])


def save_at(run, step, rounds=None):
    """A checkpoint of no files, as it would be of the log of so many rounds."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    held = hashlib.sha256(b"".join(lines[: rounds or step])).hexdigest()
    (run / "checkpoints" / str(step)).mkdir()
    (run / "checkpoints" / str(step) / "sha256.json").write_text(json.dumps({"log": held, "files": {}}))


def flip_digit(run, line):
    """One bit of the latency."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace('"latency_s": 1.5', '"latency_s": 1.4')
    (run / "metrics.jsonl").write_text("".join(lines))


def test_the_log_of_a_run_that_has_not_ended_is_that_of_its_checkpoints_oracle_the_log_as_saved(tmp_path):
    """What no checkpoint was written with is told as it is; so is a whole log."""
    run = write_run(tmp_path / "run", ended=False)
    save_at(run, 2)
    save_at(run, 4)
    for line in (None, 6):
        if line:
            flip_digit(run, line)
        assert len(load_runs([run])[0].metrics) == ROUNDS
    flip_digit(run, 4)
    with pytest.warns(RunWarning, match="4 is passed over: .*metrics.jsonl does not hold its rounds as they were"):
        load_runs([run])
    flip_digit(run, 1)
    with (
        pytest.warns(RunWarning),
        pytest.raises(ValueError, match="run must hold the log that its checkpoints") as error,
    ):
        load_runs([run])
    assert "\n" not in str(error.value)


def test_a_folder_of_runs_is_told_by_those_that_have_begun_and_are_not_hidden(tmp_path):
    """Oracle: the names of the folders."""
    for name in ("a", "b", ".a.partial-1"):
        write_run(tmp_path / "sweep" / name)
    empty = RunFolder.create(tmp_path / "sweep" / "c", "seed: 0", {}).path
    (empty / "metrics.jsonl").write_text('{"round": 1, ')
    with pytest.warns(RunWarning, match="c is left out: the run has no finished round"):
        assert [run.name for run in load_runs([tmp_path / "sweep"])] == ["a", "b"]
    RunFolder.create(tmp_path / "none" / "a", "seed: 0", {})
    with pytest.raises(ValueError, match="none must hold a run with at least one finished round, got 1 without"):
        load_runs([tmp_path / "none"])


OURS = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<title>a, b - fedjax-lora</title>\n</head>\n'


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (OURS, True),
        (OURS.replace("<title>", '<meta name="generator" content="mkdocs-1.6.1"><title>'), False),
        (OURS.replace("fedjax-lora<", "notes<"), False),
        ("<!DOCTYPE html><head><title>x</title></head><p><title>y - fedjax-lora</title></p>", False),
        ("fedjax-lora", False),
        ("", False),
    ],
)
def test_a_report_replaces_nothing_but_a_report_oracle_the_bytes_before(tmp_path, text, ours):
    run, out = write_run(tmp_path / "run"), tmp_path / "notes.html"
    out.write_text(text)
    if ours:
        for _ in range(2):  # an older report, then a new one
            assert render([run], out).plots == PLOTS
    else:
        with pytest.raises(ValueError, match=r"^report .*notes.html must be a new file, or a report to replace.*none$"):
            check_replaceable(out)
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert out.read_text() == text


def test_a_report_spares_the_files_of_a_run_and_needs_its_folder(tmp_path):
    """Oracle: the bytes before."""
    run = write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (tmp_path / "link.html").symlink_to(run / "config.yaml")
    for out in [*before, tmp_path / "link.html", run]:
        with pytest.raises(ValueError, match="report"):
            check_replaceable(out)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    with pytest.raises(ValueError, match="got no folder"):
        check_replaceable(tmp_path / "absent" / "report.html")
