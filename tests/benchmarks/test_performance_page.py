"""The performance page against the JSON that it is written from, and the commands of the short form."""

import json
import shlex

import pytest


def test_the_page_says_what_the_json_say(benchmark):
    """Oracle: writing the page anew changes nothing."""
    module = benchmark("performance_page")
    page = module.PAGE.read_text()
    assert module.rewritten(page, module.RESULTS) == page


def toy_page(module):
    """The markers alone, around text of one's own."""
    blocks = (f"<!-- {name}: from JSON -->\nold\n<!-- {name}: end -->\nmine {name}\n" for name in module.BLOCKS)
    return "".join(blocks)


def test_numbers_are_those_of_the_files_and_text_outside_stays(benchmark, tmp_path):
    """By hand, from files with known numbers; what is absent is empty."""
    module = benchmark("performance_page")
    side = {"samples_per_s": {"median": 78.4}, "compile_s": 28.69, "gflops": 50.0, "round_s": [1.0] * 7}
    found = {"ratio": {"median": 1.779, "min": 1.454, "max": 2.107}, "matmul_gflops": {"jax": 80.0, "torch": 100.0}}
    found |= {"engine": side, "peer": {"samples_per_s": {"median": 41.6}, "gflops": 25.0}}
    found["round"] = {"tokens": 235, "samples": 10}
    result = {"environment": {"cpu": "A"}, "workload": {"joined": 1, "length": 64, "clients": 32}}
    (tmp_path / "round_throughput_text.json").write_text(json.dumps(result | {"results": {"float32": found}}))
    sweep = {"network": {"rows": [{"at_once": 2, "compile_s": 0.0123, "ratio": 1.0, "trials_per_s": {"median": 3.14}}]}}
    (tmp_path / "sweep_throughput.json").write_text(json.dumps({"parts": sweep}))
    (tmp_path / "short").mkdir()
    machine = {"cpu": "B", "cores": 2, "git_commit": "abc"}
    (tmp_path / "short" / "sweep_throughput.json").write_text(json.dumps({"environment": machine, "parts": sweep}))
    page = module.rewritten(toy_page(module), tmp_path)
    lines = page.splitlines()
    assert "| A | float32 | SST-2, at most 64 | 24 | 78 | 42 | 1.78× (1.45–2.11) | 50 % | 25 % | 28.7 s |" in lines
    assert "| network | 2 | 3.14 | 1.00× | 12.3 ms |" in lines
    assert "B, 2 cores, commit `abc`." in lines
    assert "| `sweep_throughput.py` | trials of network, 2 at once | 3.14 a second |" in lines
    assert page.count("|---|") + page.count("| --- |") and "old" not in page
    assert all(f"mine {name}" in lines for name in module.BLOCKS)
    begin = lines.index("<!-- solvers: from JSON -->")
    assert lines[begin + 1] == "<!-- solvers: end -->"
    assert module.rewritten(page, tmp_path) == page


def test_a_page_without_a_place_is_refused(benchmark, tmp_path):
    """The error names the table."""
    module = benchmark("performance_page")
    page = toy_page(module).replace("<!-- sweeps: end -->", "")
    with pytest.raises(ValueError, match="markers of 'sweeps' once, got 1 and 0"):
        module.rewritten(page, tmp_path)


def test_every_recorded_result_has_rows(benchmark):
    """Oracle: the recorded files, which the short form's have the fields of."""
    rows, page = benchmark("short_rows"), benchmark("performance_page")
    recorded = {name for name in rows.SHORT if (page.RESULTS / f"{name}.json").exists()}
    assert recorded >= {"round_throughput", "client_overhead", "client_scaling", "compile_time", "sweep_memory"}
    for name in recorded:
        assert rows.SHORT[name](json.loads((page.RESULTS / f"{name}.json").read_text())), name


def test_solver_rows_have_the_ratio_of_their_own_size(benchmark):
    """By hand: TSFA's peer solves the continuous problem alone."""
    call = {"call_s": {"median": 0.002}}
    held = {
        "tsfa": {
            "sizes": {"16": {"round": call, "solve": call}},
            "beside_cvxpy": {"16": {"ours": call, "ratio": 145.2}},
        },
        "scheduling": {"sizes": {}, "beside_cvxpy": {"5": {"energy": {"ours": call, "ratio": 7.0}}}},
    }
    assert benchmark("short_rows").solver_rows(held) == [
        ["tsfa, round", "16", "2.00 ms", "–"],
        ["tsfa, solve", "16", "2.00 ms", "145×"],
        ["scheduling, energy", "5", "2.00 ms", "7×"],
    ]


def test_times_are_told_in_the_unit_that_reads_well(benchmark):
    """By hand."""
    table = benchmark("table")
    told = [table.seconds(value) for value in (123.4, 12.34, 1.234, 0.01234, 0.0001234)]
    assert told == ["123 s", "12.3 s", "1.23 s", "12.3 ms", "123 µs"]


def test_the_short_form_runs_scripts_that_take_its_options(benchmark):
    """Oracle: the scripts' own text, or what they share."""
    short = benchmark("short")
    folder = short.Path(short.__file__).parent
    assert set(short.COMMANDS) == set(benchmark("short_rows").SHORT)
    for name, options in short.COMMANDS.items():
        text = (folder / f"{name}.py").read_text() + (folder / "common.py").read_text()
        text = text.replace('f"--{name}"', " ".join(f'"--{size}"' for size in ("layers", "rounds", "trials")))
        for option in shlex.split(options):
            assert not option.startswith("--") or f'"{option}"' in text, (name, option)


def test_a_benchmark_that_fails_leaves_its_reason_and_no_file(benchmark, tmp_path):
    """By hand: an option that no script has."""
    out = tmp_path / "sweep_memory.json"
    out.write_text("{}")
    reason = benchmark("short").run("sweep_memory", "--no-such-option", tmp_path, 60.0)
    assert "--no-such-option" in reason and not out.exists()
