"""Reports and tables: the log's own values, whatever is missing in it. The oracle is the log that was written."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from fedjax_lora.io.log import FIELDS, RunFolder
from fedjax_lora.report.html import write_report
from fedjax_lora.report.plots import _accuracy, all_plots, run_colors
from fedjax_lora.report.runs import differing_keys, load_runs
from fedjax_lora.report.tables import MISSING, comparison, summary_lines, summary_rows

ROUNDS = 6


class Page(HTMLParser):
    """Cells of the table by row, number of plots, ids, and whatever would have to be fetched."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.plots, self.ids, self.fetched, self.notes, self.inside = [], 0, [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.inside.append(tag)
        self.plots += tag == "svg"
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "p":
            self.notes.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "th" in self.inside or "td" in self.inside:
            self.rows[-1][-1] += data
        elif self.inside and self.inside[-1] == "p":
            self.notes[-1] += data


def write_run(folder, config=None, ended=True, **columns):
    run = RunFolder.create(folder, yaml.safe_dump(config or {"seed": 0}), {})
    with (run.path / "metrics.jsonl").open("a") as file:
        for i in range(ROUNDS):
            line = dict.fromkeys(FIELDS, 0.5) | {
                "round": i + 1,
                "personal_accuracy": None,
                "participants": 3 + i % 2,
                "uplink_bits": 10**9 + i,
            }
            line |= {"downlink_bits": 7, "latency_s": 1.5, "cumulative_latency_s": 1.5 * (i + 1)}
            line |= {"eval_accuracy": (i + 1) / 7 if i % 2 else None, "eval_loss": 0.25 if i % 2 else None}
            file.write(json.dumps(line | {name: values[i] for name, values in columns.items()}) + "\n")
    if ended:
        run.write_summary(
            {"initial_accuracy": 0.1, "wall_s": 12.5, "compile_s": 2.0, "device": "1 x cpu", "seed": 0}
            | {"versions": {"jax": "0.10"}, "partition_hash": "abc", "peak_memory_bytes": 2048}
        )
    return run.path


def render(folders, out):
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
        "queue at the end, s": "0.5",
        "uplink, bits": f"{6 * 10**9 + 15:,}",
        "downlink, bits": "42",
        "participants a round": "3.5",
        "wall time, s": "12.5",
        "of it compiling, s": "2",
        "samples/s": MISSING,
        "peak memory, bytes": "2,048",
        "device": "1 x cpu",
        "versions": "jax 0.10",
        "seed": "0",
        "partition": "abc",
    }
    assert page.plots == 8


def test_a_report_is_self_contained_and_its_ids_are_unique_oracle_html_rules(tmp_path):
    page = render([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path / "report.html")
    assert page.fetched == []
    assert len(set(page.ids)) == len(page.ids)


def test_several_runs_stand_side_by_side_with_the_keys_in_which_they_differ(tmp_path):
    configs = [{"seed": 0, "lora": {"rank": r, "alpha": 16.0}} for r in (4, 8)]
    folders = [write_run(tmp_path / f"rank <{i}>", config) for i, config in enumerate(configs)]
    page = render(folders, tmp_path / "report.html")
    assert page.rows[0] == ["", "rank <0>", "rank <1>"]
    assert page.rows[1] == ["lora.rank", "4", "8"]
    assert not [row for row in page.rows if row[0] == "lora.alpha"]
    assert page.plots == 8


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
        ({"cumulative_latency_s": [None] * ROUNDS, "latency_s": [None] * ROUNDS}, 6, "unbounded"),
        ({"cumulative_latency_s": [0.0] * ROUNDS}, 7, "no simulated time"),
        ({"sparsification_error": [None] * ROUNDS, "covariance_error": [None] * ROUNDS}, 7, "Not measured"),
        ({"dropped_energy": [None] * ROUNDS}, 7, "Not measured"),
        ({"eval_loss": [None] * ROUNDS}, 8, None),
        ({"train_loss": [None, 1.0, None, None, 2.0, 3.0]}, 8, None),
        ({"cumulative_latency_s": [1.0, 2.0] + [None] * 4}, 8, None),
    ],
)
def test_values_that_are_missing_leave_a_note_where_nothing_is_left_to_draw(tmp_path, columns, plots, note):
    page = render([write_run(tmp_path / "run", **columns)], tmp_path / "report.html")
    assert page.plots == plots
    assert len(page.notes) == 8 - plots
    assert note is None or any(note in text for text in page.notes)


def test_a_log_without_the_energy_is_reported_without_it(tmp_path):
    """Oracle: the report of the same log with nulls."""
    path = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    pages = []
    for energy in ({"dropped_energy": None}, {}):
        kept = [{key: value for key, value in line.items() if key != "dropped_energy"} | energy for line in lines]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        write_report([path], tmp_path / "report.html")
        pages.append((tmp_path / "report.html").read_text())
    assert pages[0] == pages[1]


def test_a_run_that_has_not_ended_is_told_by_its_metrics(tmp_path):
    path = write_run(tmp_path / "run", ended=False)
    rows = dict(summary_rows(load_runs([path])))
    assert rows["final accuracy"] == [f"{6 / 7:.4f}"]
    assert rows["initial accuracy"] == rows["wall time, s"] == [MISSING]
    assert render([path], tmp_path / "report.html").plots == 8


def test_every_plot_is_well_formed_and_takes_its_ink_from_the_page_oracle_xml_parser(tmp_path):
    for plot in all_plots(load_runs([write_run(tmp_path / "run")])):
        root = ElementTree.fromstring(plot.svg)
        assert {"width", "height"}.isdisjoint(root.attrib)
        assert "currentColor" in plot.svg
        assert "#01020" not in plot.svg
        assert "#000000" not in plot.svg


def test_each_run_has_a_colour_of_its_own_oracle_a_set():
    for count in (1, 8, 9, 30):
        assert len(set(run_colors(count))) == count


def test_comparison_of_many_runs_in_the_terminal_has_one_line_a_run(tmp_path):
    folders = [write_run(tmp_path / f"[red]{x}", {"x": x}) for x in [*range(9), None]]
    lines = comparison(folders).splitlines()
    rows = [next(line.split() for line in lines if f"[red]{x}" in line) for x in (1, None)]
    accuracy = f"{6 / 7:.4f}"
    assert rows[0] == ["[red]1", "1", "0.1000", accuracy, accuracy, "6", "9", "1.5", f"{6 * 10**9 + 15:,}"]
    assert rows[1][1] == MISSING
    assert max(map(len, lines)) < 160


def test_comparison_of_few_runs_in_the_terminal_has_one_column_a_run(tmp_path):
    folders = [write_run(tmp_path / "[red]", {"x": 1}), write_run(tmp_path / "b", {"x": None})]
    rows = {line.split()[0]: line.split()[-2:] for line in comparison(folders).splitlines() if line.strip("─ ")}
    assert rows["run"] == ["[red]", "b"] and rows["x"] == ["1", MISSING] and rows["final"] == [f"{6 / 7:.4f}"] * 2


def test_summary_lines_show_the_headline_of_a_summary(tmp_path):
    summary = load_runs([write_run(tmp_path / "run")])[0].summary
    lines = summary_lines(summary).splitlines()
    assert [line.split()[-1] for line in lines] == [
        "0.1000",
        "0.8571",
        "0.8571",
        "6",
        "9",
        "1.5",
        f"{6 * 10**9 + 15:,}",
    ]


def test_personal_accuracy_stands_beside_the_global_one_where_a_run_has_it(tmp_path):
    personal = [None, 0.5, None, 0.625, None, 0.75]
    folders = [write_run(tmp_path / "fedsa", personal_accuracy=personal), write_run(tmp_path / "fedit")]
    runs = load_runs(folders)
    assert dict(summary_rows(runs))["personal accuracy"] == ["0.7500", MISSING]
    assert "personal accuracy   0.7500" in summary_lines(runs[0].summary)
    assert "personal accuracy" not in summary_lines(runs[1].summary)
    assert "personal accuracy" in comparison(folders) and "personal accuracy" not in comparison(folders[1:])
    with_own, without = all_plots(runs[:1])[0].svg, all_plots(runs[1:])[0].svg
    assert "clients' own" in with_own and "global" in with_own
    assert "clients' own" not in without and "global" not in without
    # Oracle: a line's points are those of the log; the second begins with the first round that measured it.
    lines = _accuracy(lambda line: line["round"])(runs[0])
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
