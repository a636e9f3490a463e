"""The report of a sweep. The oracle is NumPy on the columns that the runs were written with, or what is named."""

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from fedjax_lora.app.cli import main
from fedjax_lora.io.sweep import read_found, write_found
from fedjax_lora.report import drawing
from fedjax_lora.report.axes import axes_of, is_grid, title_of
from fedjax_lora.report.cells import results
from fedjax_lora.report.html import check_replaceable
from fedjax_lora.report.sweep import check_asked, sweep_table, write_sweep_report
from fedjax_lora.report.sweep_plots import _curve, _field
from report.folders import ROUNDS, write_sweep

SVG = "{http://www.w3.org/2000/svg}"
EVALUATED = [1, 3, 5]
"""Places of the rounds that have an accuracy."""


@pytest.fixture
def quick(monkeypatch):
    """Plots without content."""
    monkeypatch.setattr(drawing, "_svg", lambda figure, title: '<svg xmlns="http://www.w3.org/2000/svg"/>')


def columns(seed, **fixed):
    """Random accuracies, latencies and bits."""
    rng = np.random.default_rng(seed)
    accuracy = [float(x) if i in EVALUATED else None for i, x in enumerate(rng.uniform(0.2, 0.9, ROUNDS))]
    latency = [float(x) for x in rng.uniform(1, 2, ROUNDS)]
    drawn = {
        "eval_accuracy": accuracy,
        "latency_s": latency,
        "cumulative_latency_s": np.cumsum(latency).tolist(),
        "uplink_bits": [int(x) for x in rng.integers(10**6, 10**7, ROUNDS)],
    }
    return drawn | fixed


def grid(folder, *keys, seeds=3, status="ended"):
    """A sweep over (key, values) each and so many seeds; and the columns of each trial."""
    axes = {**dict(keys), "seed": list(range(seeds))}
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    written = [columns(place) for place in range(len(settings))]
    return write_sweep(folder, [(s, status, c) for s, c in zip(settings, written, strict=True)]), written


def body_of(found, out, target=None):
    """The page that is written to `out`, read as XML: strictly, so that nothing unescaped gets by."""
    write_sweep_report(found, out, target)
    text = out.read_text().partition("<body>")[2].partition("</body>")[0]
    return ElementTree.fromstring(f"<body>{text}</body>")


def texts(element):
    return ["".join(cell.itertext()) for cell in element]


def rows_of(text):
    """Lines of a table for a terminal, below its rule."""
    lines = text.splitlines()
    return lines[next(place for place, line in enumerate(lines) if line.startswith(" ─")) + 1 :]


def tables(body, kind=None):
    """Rows of texts of each table, of one class."""
    return [[texts(row) for row in t.iter("tr")] for t in body.iter("table") if t.get("class") == kind]


def test_a_cell_has_the_mean_and_the_sample_deviation_over_its_seeds(tmp_path):
    found, written = grid(tmp_path, ("V", [1, 2]))
    cells = results(found).cells
    assert [cell.setting for cell in cells] == [{"V": 1}, {"V": 2}]
    for place, cell in enumerate(cells):
        mine = written[3 * place : 3 * place + 3]
        for field, values in {
            "final_accuracy": [c["eval_accuracy"][-1] for c in mine],
            "total_uplink_bits": [sum(c["uplink_bits"]) for c in mine],
            "total_latency_s": [sum(c["latency_s"]) for c in mine],
        }.items():
            spread = cell.spread(field)
            np.testing.assert_allclose(spread[:2], [np.mean(values), np.std(values, ddof=1)], rtol=1e-12)
    alone = results(grid(tmp_path / "alone", ("V", [1]), seeds=1)[0]).cells[0]
    assert alone.spread("final_accuracy").deviation is None


def test_what_was_spent_until_a_target_is_the_mean_over_the_seeds_that_reached_it(tmp_path):
    """Oracle: a NumPy search in the columns."""
    found, written = grid(tmp_path, ("V", [1, 2, 3]))
    told = results(found, target=0.7)
    for place, cell in enumerate(told.cells):
        spent = []
        for c in written[3 * place : 3 * place + 3]:
            high = np.flatnonzero(np.array(c["eval_accuracy"], float) >= 0.7)
            if high.size:
                first = high[0]
                spent.append([first + 1, np.sum(c["uplink_bits"][: first + 1]), c["cumulative_latency_s"][first]])
        reached = cell.reached("final_accuracy", 0.7)
        assert (reached.by, reached.trials) == (len(spent), 3)
        if spent:
            got = [reached.rounds.mean, reached.bits.mean, reached.seconds.mean]
            np.testing.assert_allclose(got, np.mean(spent, axis=0), rtol=1e-12)
        else:
            assert reached[:3] == (None, None, None)
    assert len({cell.reached("final_accuracy", 0.7).by for cell in told.cells}) > 1  # the case has both


def test_a_target_that_is_not_reached_is_told_so_and_how_many_reached_it(tmp_path):
    """By hand."""
    high, low = ([None, x, None, x, None, x] for x in (0.8, 0.4))
    trials = [({"V": 1, "seed": s}, "ended", columns(s, eval_accuracy=a)) for s, a in enumerate([high, high, low])]
    trials += [({"V": 2, "seed": s}, "ended", columns(s, eval_accuracy=low)) for s in range(3)]
    found = write_sweep(tmp_path, trials)
    lines = rows_of(sweep_table(found))
    assert "2 of 3" in lines[0] and "not reached" not in lines[0]
    assert "0 of 3" in lines[1] and lines[1].count("not reached") == 3
    assert "target: accuracy 0.7600, 0.95 of the best of all trials; choose with --target" in lines
    asked = sweep_table(found, target=0.9)
    assert "target: accuracy 0.9000\n" in asked and asked.count("not reached") == 6
    assert "simulated" in asked and "reached by" in asked
    for wrong in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="target must be an accuracy above 0 and at most 1, got"):
            sweep_table(found, target=wrong)


def test_the_clients_own_accuracy_is_told_where_every_run_has_it(tmp_path, quick):
    own = [None, 0.5, None, 0.75, None, 1.0]
    trials = [({"V": v}, "ended", columns(v, personal_accuracy=own)) for v in (1, 2)]
    told = results(write_sweep(tmp_path / "all", trials))
    assert told.measure == "personal_accuracy" and told.target == 0.95
    assert told.cells[0].reached(told.measure, 0.75).rounds.mean == 4
    mixed = write_sweep(tmp_path / "mixed", [trials[0], ({"V": 2}, "ended", columns(2))])
    assert results(mixed).measure == "final_accuracy"
    table = tables(body_of(mixed, tmp_path / "report.html"))[0]
    assert {"final accuracy", "personal accuracy"} <= set(table[0])


@pytest.mark.parametrize(
    ("sort", "field", "sign"),
    [(None, "final_accuracy", -1), ("final_accuracy", "final_accuracy", -1), ("total_latency_s", "total_latency_s", 1)],
)
def test_the_table_has_a_row_a_cell_best_first(tmp_path, sort, field, sign):
    found, _ = grid(tmp_path, ("V", [1, 2, 3, 4, 5]))
    means = [cell.spread(field).mean for cell in results(found).cells]
    rows = [line.split() for line in rows_of(sweep_table(found, sort))[:5]]
    assert [int(row[0]) for row in rows] == [1 + i for i in np.argsort(sign * np.array(means), kind="stable")]
    assert [row[1] for row in rows] == ["3"] * 5


def test_any_column_of_the_results_sorts_and_no_other(tmp_path):
    found, _ = grid(tmp_path, ("control.V", [3, 1, 2]))
    write_found(found)
    names = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    for name in names:
        if name == "seed":
            continue
        first = [line.split()[0] for line in rows_of(sweep_table(found, name))[:3]]
        if name == "control.V":
            assert first == ["1", "2", "3"]
        assert sorted(first) == ["1", "2", "3"]
        check_asked(name, 0.5, found.settings.values())
    for name in ("accuracy", "seed"):
        with pytest.raises(
            ValueError, match=r"sort must be one of trial, control\.V, status, final_accuracy,"
        ) as error:
            check_asked(name, None, found.settings.values())
        assert "\n" not in str(error.value) and str(error.value).endswith(f"got {name!r}")
    assert "wall time, s" in sweep_table(found, "wall_s") and "wall time, s" not in sweep_table(found)


NAN = columns(0, eval_accuracy=[None, 0.9, None, 0.9, None, None], eval_loss=[None] * 6, participants=[0] * 6)
ODD = [
    *(({"V": 1, "seed": s}, "ended", columns(s)) for s in (0, 1)),
    ({"V": 1, "seed": 2}, "diverged", NAN),
    *(({"V": 2, "seed": s}, "diverged", NAN) for s in range(3)),
    *(({"V": 3, "seed": s}, "refused", {}) for s in range(3)),
    *(({"V": 4, "seed": s}, "stopped", columns(7 + s)) for s in range(3)),
    ({"sparsifier": {"name": "<top & k>"}, "keep": 0.5, "seed": 0}, "ended", columns(9)),
]
"""A sweep in which everything happens; V = 1 is told by its seeds 0 and 1."""


def test_trials_that_did_not_end_have_no_part_in_the_numbers_and_a_line_below(tmp_path):
    found = write_sweep(tmp_path, ODD)
    cells = results(found).cells
    assert [cell.status for cell in cells] == ["2 ended, 1 diverged", "3 diverged", "3 refused", "3 stopped", "1"]
    ended = [ODD[i][2]["eval_accuracy"][-1] for i in (0, 1)]
    assert cells[0].spread("final_accuracy").mean == pytest.approx(np.mean(ended))
    assert cells[1].spread("final_accuracy") is cells[2].spread("final_accuracy") is None
    assert cells[3].spread("final_accuracy").size == 3
    assert cells[0].reached("final_accuracy", 0.9).by == 1  # before it diverged
    lines = sweep_table(found).splitlines()
    assert sum(line.startswith("diverged: ") and "nothing was learned in 6 of 6" in line for line in lines) == 4
    assert "refused: V=3,seed=1: rank must be a whole number, got '<b>&'" in lines
    assert "stopped: V=4,seed=0: it lagged behind after round 6 of 9" in lines
    last = [line.split()[0] for line in rows_of("\n".join(lines))[3:5]]
    assert last == ["2", "3"]  # what has no value


def test_whatever_stands_in_a_sweep_is_text_on_its_page_oracle_xml_parser(tmp_path):
    out = tmp_path / "report.html"
    body = body_of(write_sweep(tmp_path / "sweep", ODD), out)
    check_replaceable(out)  # it is a report
    head = out.read_text().partition("<body>")[0]
    assert not any(word in head for word in ("<link", "<script", "@import", "url("))
    elements = list(body.iter())
    links = [value for e in elements for name, value in e.items() if name.split("}")[-1] in ("src", "href")]
    assert links and all(link.startswith("#") for link in links)
    ids = [e.get("id") for e in elements if e.get("id")]
    assert ids and len(set(ids)) == len(ids)
    assert not {"b", "script", "top"} & {e.tag for e in body.find("details").iter()}
    (summary,) = body.iter("summary")
    assert summary.text == "4 diverged, 3 stopped early, 3 refused of 13 trials"
    assert "V=3,seed=0: rank must be a whole number, got '<b>&'" in [li.text for li in body.find("details").iter("li")]
    assert texts(body.iter("h1")) == ["V, sparsifier, keep, 3 seeds: 13 trials"]
    (table,) = tables(body)
    assert len(table) == 1 + 5 and table[0][:4] == ["V", "sparsifier", "keep", "trials"]
    assert any("<top & k>" in row[1] for row in table)


def test_two_keys_are_a_heat_map_of_the_means_and_what_failed_is_marked(tmp_path, quick):
    keys = ("control.V", [10, 1, 3]), ("control.latency_budget_s", [2, 4])
    found, written = grid(tmp_path / "sweep", *keys, seeds=2)
    status = found.status | {name: "diverged" for name, s in found.settings.items() if list(s.values())[:2] == [3, 2]}
    found = found._replace(status=status)
    body = body_of(found, tmp_path / "report.html")
    assert texts(body.iter("h1")) == ["V × latency budget, 2 seeds: 12 trials"]
    maps = tables(body, "heat")
    assert len(maps) == 3
    accuracy = maps[0]
    assert accuracy[:2] == [["", "latency budget"], ["V", "2 s", "4 s"]]
    finals = np.array([c["eval_accuracy"][-1] for c in written]).reshape(3, 2, 2).mean(axis=-1)[[1, 2, 0]]
    assert [row[0] for row in accuracy[2:]] == ["1", "3", "10"]
    assert [row[1:] for row in accuracy[2:]] == [
        [f"{x:.4f}" if (i, j) != (1, 0) else "diverged" for j, x in enumerate(row)] for i, row in enumerate(finals)
    ]
    best = [cell.text for cell in body.iter("td") if cell.get("class") == "best"]
    finals[1, 0] = 0
    assert f"{finals.max():.4f}" in best


def test_three_keys_are_a_heat_map_for_each_value_of_the_third(tmp_path, quick):
    found, _ = grid(tmp_path / "sweep", ("V", [1, 2]), ("rank", [4, 8, 16]), ("name", ["a", "b"]), seeds=1)
    body = body_of(found, tmp_path / "report.html")
    assert len(tables(body, "heat")) == 3 * 2
    captions = [figure.find("figcaption").text for figure in body.iter("figure")]
    assert captions[:2] == ["Final accuracy; name a", "Final accuracy; name b"]
    assert texts(body.iter("h1")) == ["V × rank × name: 12 trials"]


@pytest.mark.parametrize(
    ("settings", "by", "heats"),
    [
        ([{"rate": 10.0**-i, "alpha": 1.5 * i} for i in range(1, 5)], ["rate", "alpha"], 0),
        (
            [dict(zip("abcd", v, strict=True)) for v in itertools.product([0, 1], repeat=4)],
            list("abcd"),
            0,
        ),
    ],
)
def test_draws_and_more_keys_than_three_are_points_by_each_key(tmp_path, quick, settings, by, heats):
    """By definition."""
    found = write_sweep(tmp_path / "sweep", [(s, "ended", columns(i)) for i, s in enumerate(settings)])
    body = body_of(found, tmp_path / "report.html")
    captions = [figure.find("figcaption").text for figure in body.iter("figure")]
    assert captions[: len(by)] == [f"Final accuracy by {key}" for key in by]
    assert len(tables(body, "heat")) == heats


@pytest.mark.parametrize(
    ("settings", "axes", "title"),
    [
        ([{"seed": 0}, {"seed": 1}], [], "2 seeds: 2 trials"),
        ([{"x": 1}], [], "1 trial"),
        (
            [{"s": "soft", "V": v} for v in (1, 2)] + [{"s": "top_k", "keep": 0.5, "V": v} for v in (1, 2)],
            [("s", "keep"), ("V",)],
            "s, keep × V: 4 trials",
        ),
        ([{"a.name": "x"}, {"b": 2}, {"b": 3}], [("a.name", "b")], "a, b: 3 trials"),
        (
            [dict.fromkeys("abcde", i) for i in range(3)],
            [(key,) for key in "abcde"],
            "a × b × c × 2 more: 3 trials",
        ),
    ],
)
def test_keys_that_only_some_settings_have_are_one_axis_oracle_by_hand(tmp_path, settings, axes, title):
    found = results(write_sweep(tmp_path, [(setting, "ended", columns(0)) for setting in settings]))
    made = axes_of(found)
    assert [axis.keys for axis in made] == axes
    assert title_of(found, made) == title
    assert is_grid(made, found) == (len(made) < 3)


def test_values_of_an_axis_are_in_order_and_their_colours_are_too(tmp_path):
    """Oracle: sorted."""
    found = results(write_sweep(tmp_path, [({"lr_s": x, "n": str(x)}, "ended", columns(0)) for x in (3, 0.5, 10)]))
    numbers, names = axes_of(found)
    assert numbers.numbers == [0.5, 3, 10] and numbers.labels == ["0.5 s", "3 s", "10 s"]
    assert names.numbers is None and names.labels == ["3", "0.5", "10"]
    assert len(set(numbers.colors)) == 3 and numbers.colors != names.colors


def test_a_curve_is_the_mean_over_the_seeds_at_rounds_that_all_have(tmp_path):
    found, written = grid(tmp_path, ("V", [1]))
    (cell,) = results(found).cells
    curve = _curve(cell, "red", "solid", _field("cumulative_latency_s"), _field("eval_accuracy"))
    time, accuracy = (np.array([c[name] for c in written], float) for name in ("cumulative_latency_s", "eval_accuracy"))
    np.testing.assert_allclose(curve.x, time.mean(axis=0)[EVALUATED], rtol=1e-12)
    np.testing.assert_allclose(curve.y, accuracy.mean(axis=0)[EVALUATED], rtol=1e-12)
    np.testing.assert_allclose(curve.deviation, accuracy.std(axis=0, ddof=1)[EVALUATED], rtol=1e-12)
    longer = cell.trials[0].run
    longer.metrics.append(longer.metrics[-1] | {"round": 7})
    assert _curve(cell, "red", "solid", _field("round"), _field("eval_accuracy")).x == [2, 4, 6]


def test_a_sweep_on_disk_is_read_as_it_was_written(tmp_path):
    found, _ = grid(tmp_path, ("V", [1, math.inf]), seeds=1)
    assert read_found(tmp_path) is None
    write_found(found)
    assert read_found(tmp_path) == found
    (tmp_path / "sweep.json").write_text((tmp_path / "sweep.json").read_text().replace("ended", "refused", 1))
    with pytest.raises(ValueError, match=r"sweep\.json must be as it was written"):
        read_found(tmp_path)


def test_the_report_of_a_folder_of_a_sweep_is_that_of_the_sweep(tmp_path, capsys, quick):
    """Oracle: the page and the table of the sweep itself."""
    found, _ = grid(tmp_path / "sweep", ("V", [1, 2]))
    write_found(found)
    out, own = tmp_path / "report.html", tmp_path / "own.html"
    options = ["--sort", "total_latency_s", "--target", "0.5"]
    assert main(["report", str(tmp_path / "sweep"), "--out", str(out), *options]) == 0
    write_sweep_report(found, own, 0.5)
    assert out.read_text() == own.read_text()
    assert sweep_table(found, "total_latency_s", 0.5) in capsys.readouterr().out
    runs = [str(path) for path in found.folders]
    assert main(["report", *runs, "--out", str(out), "--target", "0.5"]) == 2
    assert "--sort and --target are for the folder of one sweep" in capsys.readouterr().err
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert "<h1>6 runs</h1>" in out.read_text()
