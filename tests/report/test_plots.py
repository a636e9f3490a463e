"""Plots: the log's own points, in SVG that fits any page. The oracle is the log that was written."""

from itertools import accumulate
from xml.etree import ElementTree

import pytest

from fedjax_lora.report import plots
from fedjax_lora.report.drawing import Axis, Key, Line, draw, run_colors
from fedjax_lora.report.html import write_report
from fedjax_lora.report.plots import all_plots
from fedjax_lora.report.runs import load_runs
from report.folders import ROUNDS, write_run

BUDGETS = {"control": {"latency_budget_s": 2.0, "energy_budget_j": 0.25}, "clients": {"count": 9, "per_round": 4}}


def test_a_report_is_self_contained_and_its_ids_are_unique_oracle_html_rules(tmp_path):
    out = tmp_path / "report.html"
    write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b")], out)
    head, _, body = out.read_text().partition("<body>")
    elements = list(ElementTree.fromstring(f"<body>{body.partition('</body>')[0]}</body>").iter())
    links = [value for e in elements for name, value in e.items() if name.split("}")[-1] in ("src", "href")]
    assert links and all(link.startswith("#") for link in links)
    assert not any(word in head for word in ("<link", "<script", "@import", "url("))
    ids = [e.get("id") for e in elements if e.get("id")]
    assert ids and len(set(ids)) == len(ids)


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


@pytest.fixture
def drawn(monkeypatch):
    """Plots as their titles and lines: `drawn(runs)[title]` is the lines of each run."""

    def lines_of(runs):
        found = {}
        monkeypatch.setattr(plots, "draw", lambda title, x, y, names, lines: found.update({title: lines}))
        all_plots(runs)
        return found

    return lines_of


def test_what_is_spent_stands_against_its_budget_oracle_by_hand(tmp_path, drawn):
    latency = [1.0, 3.0, 2.0, 2.0, 4.0, 0.0]
    elapsed = list(accumulate(latency))
    energy = [1.0, 3.0, 2.0, 2.0, 4.0, 0.0]
    columns = {"latency_s": latency, "cumulative_latency_s": elapsed, "energy_j": energy, "queue_s": elapsed}
    found = drawn(load_runs([write_run(tmp_path / "run", BUDGETS, **columns)]))
    rounds, means = [1, 2, 3, 4, 5, 6], [1.0, 2.0, 2.0, 2.0, 2.4, 2.0]
    assert found["Latency of a round"] == [
        [
            Line(rounds, latency, "each round"),
            Line(rounds, means, "mean so far", "dashed"),
            Line([0, 6], [2.0, 2.0], "budget", "dotted"),
        ]
    ]
    assert found["Queue of the latency budget"] == [
        [Line(rounds, elapsed, "queue"), Line([0, 6], [2.0, 2.0], "budget of one round", "dotted")]
    ]
    assert found["Energy of a round"] == [
        [
            Line(rounds, energy, "each round"),
            Line(rounds, means, "mean so far", "dashed"),
            Line([0, 6], [1.0, 1.0], "budget of all clients", "dotted"),
        ]
    ]
    assert found["Keep ratio"] == [[Line(rounds, [0.5] * ROUNDS, "keep ratio")]]


def test_without_a_budget_no_line_and_no_empty_queue_is_drawn(tmp_path, drawn):
    nothing = [0.0] * ROUNDS
    found = drawn(load_runs([write_run(tmp_path / "run", queue_s=nothing, energy_queue_j=nothing)]))
    assert not [title for title in found if "Queue" in title]
    assert [len(line.x) for line in found["Latency of a round"][0]] == [6, 6, 0]
    assert [line.label for line in found["Energy of a round"][0]] == ["each round"]


def test_a_legend_names_the_runs_or_the_lines_of_one_run():
    """By definition."""
    lines = [[Line([1, 2], [i, i], "each round"), Line([0, 2], [7, 7], "budget", "dotted")] for i in range(2)]
    blue, amber = run_colors(2)
    alone = draw("alone", Axis("x"), Axis("y"), ["a"], lines[:1])
    assert alone.legend == [Key(blue, "solid", "each round"), Key(blue, "dotted", "budget")]
    both = draw("both", Axis("x"), Axis("y", "bit"), ["a", "b"], lines)
    strokes = [Key("currentColor", "solid", "each round"), Key("currentColor", "dotted", "budget")]
    assert both.legend == [*strokes, Key(blue, "solid", "a"), Key(amber, "solid", "b")]
    assert draw("none", Axis("x"), Axis("y"), ["a"], [[Line([], [], "each round")]]).note
