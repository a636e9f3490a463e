"""The folder of a run: created whole or not at all, append-only, resumed only as it was."""

import hashlib
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from fedjax_lora.core.count import Count
from fedjax_lora.core.types import Metrics
from fedjax_lora.io.files import write_atomically
from fedjax_lora.io.log import RunFolder, may_extend
from fedjax_lora.io.run_files import (
    FIELDS,
    flatten,
    read_config,
    read_data,
    read_metrics,
    read_summary,
    whole_lines,
)

DATA = {"examples_hash": "ab", "partition_hash": "cd"}
CONFIG = "seed: 0\nlora:\n  rank: 8\n  targets:\n  - query\n"

# Of the specification, written out again: names and order.
CONTRACT = [
    "round",
    "train_loss",
    "eval_loss",
    "eval_accuracy",
    "personal_accuracy",
    "latency_s",
    "cumulative_latency_s",
    "uplink_bits",
    "downlink_bits",
    "energy_j",
    "queue_s",
    "energy_queue_j",
    "keep_ratio_mean",
    "kept_ranks_mean",
    "participants",
    "absent_weight",
    "outages",
    "nonfinite_clients",
    "sparsification_error",
    "covariance_error",
    "orthogonality",
]
BESIDE = ["dropped_energy", "tail_energy"]


def make_metrics(first=1, rounds=3, **replaced):
    values = {name: jnp.arange(rounds) + 0.1 for name in Metrics.__dataclass_fields__}
    values["round"] = jnp.arange(first, first + rounds)
    values["uplink"] = Count.of(jnp.full((rounds, 4), 2**31 + 1, jnp.uint32))
    values["downlink"] = Count.of(jnp.zeros((rounds, 4), jnp.uint32))
    values["methods"] = {}
    values["tail_energy"] = jnp.arange(rounds)[:, None] + jnp.linspace(0.3, 0.0, 5)
    values |= {name: jnp.full(rounds, 4, jnp.int32) for name in ("participants", "outages", "nonfinite_clients")}
    return Metrics(**(values | replaced))


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", CONFIG, DATA)


def test_a_new_folder_holds_the_text_of_the_configuration(run):
    assert (run.path / "config.yaml").read_text() == CONFIG
    assert read_config(run.path) == yaml.safe_load(CONFIG)
    assert run.checkpoints.is_dir()
    assert read_metrics(run.path) == []
    assert read_summary(run.path) is None
    assert sorted(os.listdir(run.path.parent)) == ["run"]


def test_create_refuses_what_is_in_use_and_leaves_it_as_it_is(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    RunFolder.create(other, CONFIG, DATA)  # an empty folder is free
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    for name, word in [
        ("run", "--resume"),
        ("other", "--resume"),
        ("file", "empty folder"),
        ("full", "empty folder"),
    ]:
        with pytest.raises(ValueError, match=word) as caught:
            RunFolder.create(tmp_path / name, "seed: 1", DATA)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match="must be a folder to write to"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG, DATA)
    assert (run.path / "config.yaml").read_text() == CONFIG
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "other", "run"]


def test_resume_takes_the_same_configuration_in_another_spelling(run):
    run.check_configuration("{lora: {targets: [query], rank: 8}, seed: 0}")


def test_resume_does_not_mind_how_a_plan_would_be_made(run):
    run.check_configuration(CONFIG + "plan: {seeds: 3}\n")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (CONFIG.replace("8", "4"), ["lora.rank ", "8", "got 4"]),
        (CONFIG.replace("query", "value"), ["lora.targets ", "['query']", "got ['value']"]),
        (CONFIG + "rounds: 3\n", ["rounds ", "absent", "got 3"]),
        ("lora:\n  rank: 8\n  targets: [query]\n", ["seed ", "0", "got absent"]),
    ],
)
def test_resume_refuses_another_configuration_by_key_and_values(run, text, fragments):
    with pytest.raises(ValueError, match="to resume") as caught:
        run.check_configuration(text)
    assert not [fragment for fragment in fragments if fragment not in str(caught.value)]


@pytest.mark.parametrize("key", list(DATA))
def test_resume_refuses_other_data_by_key_and_hashes_and_touches_nothing(run, key):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError,
        match=rf"data\.{key} must be '{DATA[key]}' .*data\.json to resume .* got 'ef'; or choose another --out$",
    ):
        run.check_data(DATA | {key: "ef"})
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("rounds", "schedule", "extends"),
    [(9, "constant", True), (6, "constant", False), (5, "constant", False), (9, "linear", False), (9, "cosine", False)],
)
def test_only_more_rounds_at_rates_that_do_not_depend_on_them_extend_a_run(tmp_path, rounds, schedule, extends):
    """By the definition of the schedules; a run that is extended has not ended any more, one that is refused stays."""
    local = f"local: {{optimizer: {{schedule: {schedule}, warmup_steps: 2}}}}\n"
    before, now = (f"{CONFIG}rounds: {number}\n{local}" for number in (6, rounds))
    run = RunFolder.create(tmp_path / "other", before, DATA)
    assert may_extend(yaml.safe_load(before), yaml.safe_load(now)) == extends
    if extends or rounds == 6:
        run.check_configuration(now)
    else:
        with pytest.raises(ValueError, match=rf"rounds must be 6 .* got {rounds}"):
            run.check_configuration(now)
        return
    (run.path / "summary.json").write_text("{}")
    run.reopen(0, now)
    run.check_configuration(now)
    assert (run.path / "config.yaml").read_text() == now
    assert not (run.path / "summary.json").exists()


def test_a_configuration_that_was_changed_since_is_one_line(run):
    (run.path / "config.yaml").write_text(CONFIG.replace("8", "4"))
    for text in (CONFIG, CONFIG.replace("8", "4")):
        with pytest.raises(ValueError, match=r"config\.yaml must be as it was when the run was started"):
            run.check_configuration(text)


def test_resume_without_a_run_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        RunFolder(tmp_path).check_configuration(CONFIG)
    assert str(tmp_path) in str(caught.value)


def test_lines_hold_the_fields_of_the_contract_in_its_order(run):
    run.append(make_metrics())
    run.append(make_metrics(first=4, rounds=2))
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [CONTRACT + BESIDE] * 5
    assert [line["round"] for line in read_metrics(run.path)] == [1, 2, 3, 4, 5]


def test_values_are_the_arrays_own_and_bits_are_exact_oracle_python_integers(run):
    metrics = make_metrics()
    run.append(metrics)
    lines = read_metrics(run.path)
    assert lines[1]["uplink_bits"] == 4 * (2**31 + 1)  # past uint32, and odd: float32 would round it
    assert type(lines[1]["participants"]) is int
    assert lines[2]["cumulative_latency_s"] == 2.1
    for name, attribute in FIELDS.items():
        column = np.asarray([line[name] for line in lines])
        np.testing.assert_array_equal(column.astype(np.float32), np.asarray(getattr(metrics, attribute), np.float32))


def test_nan_and_infinity_are_null_oracle_strict_json(run):
    profile = jnp.array([[jnp.nan, jnp.nan], [2.0, 0.0], [1.0, 0.0]])
    given = {"eval_loss": jnp.array([jnp.nan, jnp.inf, 2.0]), "latency_s": jnp.full(3, -jnp.inf)}
    run.append(make_metrics(**given, tail_energy=profile))

    def refuse(word):
        raise AssertionError(word)

    text = (run.path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["eval_loss"] for line in lines] == [None, None, 2.0]
    assert [line["latency_s"] for line in lines] == [None] * 3
    assert [line["tail_energy"] for line in lines] == [[None, None], [2.0, 0.0], [1.0, 0.0]]


def test_a_torn_last_line_does_not_count_and_is_cut_off_oracle_untorn_log(run):
    run.append(make_metrics())
    path = run.path / "metrics.jsonl"
    whole = path.read_text()
    for torn in ("{", '{"round": 4, "train_loss": 0.', '{"round": 4}'):
        path.write_text(whole + torn)
        assert [line["round"] for line in read_metrics(run.path)] == [1, 2, 3]
        run.reopen(3, CONFIG)
        assert path.read_text() == whole


@pytest.mark.parametrize("rounds", [0, 2])
def test_truncate_then_append_gives_the_log_of_an_uninterrupted_run(run, tmp_path, rounds):
    run.append(make_metrics())
    run.reopen(rounds, CONFIG)
    run.append(make_metrics(first=rounds + 1, rounds=5 - rounds))
    assert [line["round"] for line in read_metrics(run.path)] == [1, 2, 3, 4, 5]


def test_a_damaged_log_is_an_error_that_names_the_line(run):
    run.append(make_metrics())
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in (["{\n", *lines[1:]], [*lines[1:]], ["3\n"]):
        path.write_text("".join(damaged))
        with pytest.raises(ValueError, match="line 1 must be the JSON object of round 1"):
            read_metrics(run.path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"uplink_bits"', '"uplink_bitr"', "must hold 23 fields, of a round and no others, got .*uplink_bit"),
        ('"eval_loss": 1.1, ', "", "must hold 23 fields, .* got no 'eval_loss'"),
        ('"eval_loss": 1.1', '"eval_loss": "1.1"', "must hold a number or null as 'eval_loss', got '1.1'"),
        ('"eval_loss": 1.1', '"eval_loss": true', "a number or null as 'eval_loss', got 'True'"),
        ('"eval_loss": 1.1', '"eval_loss": [1.1]', "a number or null as 'eval_loss'"),
        ('"eval_loss": 1.1', '"eval_loss": NaN', "a number or null as 'eval_loss'"),
        ('"eval_loss": 1.1', '"eval_loss": 1e999', "a number or null as 'eval_loss'"),
        ('"participants": 4', '"participants": null', "must hold a whole number as 'participants', got 'None'"),
        ('"participants": 4', '"participants": 4.5', "a whole number as 'participants', got '4.5'"),
        ('"participants": 4', '"participants": -4', "a whole number as 'participants', got '-4'"),
        ('"tail_energy": [', '"tail_energy": ["", ', "must hold a list of numbers as 'tail_energy'"),
        ('"tail_energy": [', '"tail_energy": [[], ', "a list of numbers as 'tail_energy'"),
        ('"round": 2', '"round": 3', "must be the JSON object of round 2"),
        ('"round": 2', '"round": ' + "[" * 100_000, "must be the JSON object of round 2"),
    ],
)
def test_a_line_that_is_no_rounds_is_one_line_that_names_it_oracle_by_hand(run, old, new, reason):
    run.append(make_metrics())
    path = run.path / "metrics.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    assert second.count(old) == 1
    path.write_bytes("".join([first, second.replace(old, new), third]).encode())
    with pytest.raises(ValueError, match=rf"^{path} line 2 .*{reason}") as caught:
        read_metrics(run.path)
    assert "\n" not in str(caught.value)


def test_only_a_newline_ends_a_line_and_junk_is_not_dropped_oracle_the_bytes(run):
    run.append(make_metrics(rounds=1))
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"junk\r{}\n")
    assert b"".join(whole_lines(run.path)) == path.read_bytes()
    with pytest.raises(ValueError, match="line 2 must be the JSON object of round 2"):
        read_metrics(run.path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "changed or damaged"),
        ('{"a": ' * 100_000, "changed or damaged"),
        ('{"a": 1, "sha256": "ab"}', "changed or damaged"),
        ('{"a": 1}', "hold the sha256 of its content, got a file written by an older version"),
    ],
)
def test_a_file_without_the_seal_of_its_content_is_one_line_oracle_by_hand(run, text, reason):
    (run.path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.json must .*{reason}") as caught:
        read_data(run.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!timestamp x", "line 1 must be valid YAML"),
        ("a: 1\na: 2", "line 2 must be valid YAML, got key 'a' twice"),
        ("a: " + "9" * 5000, "must be valid YAML"),
        ("[1]", "must be a mapping"),
        ("", "empty"),
    ],
)
def test_a_configuration_that_cannot_be_read_names_its_file_in_one_line(run, text, reason):
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^configuration {run.path}/config\.yaml .*{reason}") as caught:
        read_config(run.path)
    assert "\n" not in str(caught.value)


def test_a_configuration_is_read_as_everywhere_else_oracle_yaml_1_2(run):
    (run.path / "config.yaml").write_text("rounds: 010\nname: no\n")
    assert read_config(run.path) == {"rounds": 10, "name": "no"}


def test_a_run_goes_where_a_link_points_and_not_in_place_of_a_mount(tmp_path, monkeypatch):
    """Invariance: the folder is the one that was linked, and the link stays; a mount point by its definition."""
    (tmp_path / "there").mkdir()
    for link, target in (("link", "there"), ("dangling", "new"), ("loop", "loop")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for link, target in (("link", "there"), ("dangling", "new")):
        RunFolder.create(tmp_path / link, CONFIG, DATA)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "config.yaml").read_text() == CONFIG
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "mount"))
    for name, reason in (("mount", "one that can be replaced"), ("loop", "a folder to write to")):
        with pytest.raises(ValueError, match=rf"{name} must be .*{reason}"):
            RunFolder.create(tmp_path / name, CONFIG, DATA)
    RunFolder.create(tmp_path / "mount" / "run", CONFIG, DATA)


def test_summary_adds_up_the_log_oracle_python_loop(run):
    accuracy = jnp.array([0.5, 0.9, jnp.nan, 0.75])
    personal = jnp.array([jnp.nan, 0.25, jnp.nan, jnp.nan])
    run.append(make_metrics(rounds=4, eval_accuracy=accuracy, personal_accuracy=personal))
    told = {
        "initial_accuracy": np.float32(0.1),
        "wall_s": 2.5,
        "peak_memory_bytes": None,
        "samples_per_s": math.inf,
    }
    told |= {"device": "cpu", "versions": {"jax": "1"}, "seed": 3, "partition_hash": "ab", "plan": None}
    told |= {"latency_budget_s": 0.5}
    summary = run.write_summary(told | {"bound_effects": {"training": np.float32(0.5), "rank": jnp.float32(jnp.nan)}})
    assert summary == read_summary(run.path) == run.ended()
    assert summary.pop("metrics_sha256") == hashlib.sha256((run.path / "metrics.jsonl").read_bytes()).hexdigest()
    assert len(summary.pop("sha256")) == 64
    (missed,) = summary.pop("warnings")
    assert missed.startswith("the latency budget was missed: a round took 0.775 s on average, 1.55 times")
    assert summary == {
        "initial_accuracy": 0.1,
        "final_loss": 3.1,
        "final_accuracy": 0.75,
        "best_accuracy": 0.9,
        "personal_accuracy": 0.25,
        "total_uplink_bits": 4 * 4 * (2**31 + 1),
        "total_downlink_bits": 0,
        "total_latency_s": 3.1,
        "mean_latency_s": 3.1 / 4,
        "latency_over_budget": 3.1 / 4 / 0.5,
        "final_queue_s": 3.1,
        "rounds": 4,
        "lost_rounds": 0,
        "diverged_rounds": 4,
        "latency_budget_s": 0.5,
        "wall_s": 2.5,
        "compile_s": None,
        "samples_per_s": None,
        "peak_memory_bytes": None,
        "device": "cpu",
        "versions": {"jax": "1"},
        "seed": 3,
        "partition_hash": "ab",
        "plan": None,
        "bound_effects": {"training": 0.5, "rank": None},
        "goodput": None,
        "spent_s": None,
        "starts": None,
    }
    with pytest.raises(ValueError, match="got wall"):
        run.write_summary({"wall": 1.0})


def test_a_write_that_fails_leaves_the_old_file_oracle_its_text(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_flatten_oracle_by_hand():
    assert flatten({"a": 1, "b": {"c": {"d": [2]}, "e": None}}) == {"a": 1, "b.c.d": [2], "b.e": None}
