"""Where the time of a run goes. The oracle is by hand, and that the parts are the whole."""

import json
import os

import pytest

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io import times

LINES = [
    {"at": 100.0, "part": "start", "round": 0},
    {"at": 101.0, "part": "data"},
    {"at": 103.0, "part": "compile"},
    {"at": 108.0, "part": "rounds", "round": 5},
    {"at": 108.5, "part": "checkpoint"},
    {"at": 112.5, "part": "rounds", "round": 10},
    {"at": 113.0, "part": "checkpoint"},
    {"at": 123.0, "part": "alive"},  # killed later, in round 11 to 15
    {"at": 150.0, "part": "start", "round": 5},  # the checkpoint of round 10 was not whole
    {"at": 150.25, "part": "data"},
    {"at": 151.0, "part": "compile"},
    {"at": 155.0, "part": "rounds", "round": 10},
    {"at": 155.125, "part": "checkpoint"},
    {"at": 156.0, "part": "other"},
]


def test_seconds_by_part_oracle_by_hand():
    found = times.told(LINES)
    assert found["spent_s"] == {
        "rounds": 5 + 4,
        "data": 1.25,
        "compile": 2.75,
        "checkpoint": 0.5 + 0.5 + 0.125,
        "other": 0.875,
        "lost": 4 + 10,
        "down": 27,
    }
    assert found["starts"] == 2 and found["goodput"] == 9 / 56
    assert sum(found["spent_s"].values()) == 56


def test_parts_are_the_whole_wherever_a_kill_comes_conservation():
    for cut in range(1, len(LINES)):
        start = {"at": 200.0, "part": "start", "round": 0}
        assert sum(times.spent([*LINES[:cut], start]).values()) == 100
        assert times.spent([*LINES[:cut], start])["rounds"] == 0


def test_a_second_start_adds_to_the_first_and_not_to_what_a_kill_has_torn(tmp_path):
    path = tmp_path / times.TIMES
    with times.Times() as first:
        first.mark("data")
        first.keep_in(tmp_path)
        first.mark("rounds", 3)
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in first._lines)
    os.truncate(path, path.stat().st_size - 4)
    with times.Times() as second:
        second.keep_in(tmp_path)
        second.mark("rounds", 3)
    parts = [json.loads(line)["part"] for line in path.read_text().splitlines()]
    assert parts == ["start", "data", "start", "rounds"]
    assert second.told()["starts"] == 2 == times.told(map(json.loads, path.read_text().splitlines()))["starts"]


def test_a_clock_that_was_set_back_loses_no_time_oracle_the_first_start(tmp_path):
    future = 1e10
    (tmp_path / times.TIMES).write_text(f'{{"at": {future}, "part": "start", "round": 0}}\n')
    with times.Times() as found:
        found.mark("data")
        found.keep_in(tmp_path)
    assert found._lines[1]["at"] == future and found.told()["spent_s"]["down"] == 0
    assert 0 <= found.told()["spent_s"]["data"] < 60


def test_a_long_piece_of_work_leaves_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "_INTERVAL_S", 0.01)
    path = tmp_path / times.TIMES
    with times.Times() as found:
        found.keep_in(tmp_path)
        while path.read_text().count("alive") < 2:
            pass


@pytest.mark.parametrize("line", ["x", "[]", '{"at": 1}', '{"at": 1, "part": "sleep"}', '{"at": 1, "part": "rounds"}'])
def test_damaged_times_are_one_warning_and_begun_anew(tmp_path, line):
    (tmp_path / times.TIMES).write_text(f'{{"at": 0.5, "part": "start", "round": 0}}\n{line}\n')
    with times.Times() as found, pytest.warns(RunWarning, match="times of earlier starts are lost: .* line 2"):
        found.keep_in(tmp_path)
    assert found.told()["starts"] == 1


def test_the_line_for_people_oracle_by_hand():
    assert times.sentence(times.told(LINES)) == (
        "goodput 0.161 of 56.0 s in 2 starts: "
        "rounds 9.0, data 1.2, compile 2.8, checkpoint 1.1, other 0.9, lost 14.0, down 27.0"
    )
