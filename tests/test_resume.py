"""A run that is continued with more rounds."""

import json

from fedjax_lora.app import cli
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.io.run_files import read_data
from toy import SETTINGS


def test_an_ended_run_may_get_more_rounds_where_no_rate_depends_on_them(tmp_path, monkeypatch, capsys):
    """Oracle: the run that had as many from the start; both evaluate in the same rounds. Compiled once for all."""
    settings = [*SETTINGS, "local.optimizer.schedule=constant"]
    simulation = build(load_config(None, settings, base=preset("digits")))
    monkeypatch.setattr("fedjax_lora.app.runner.build", lambda config, methods: simulation)

    def run(name: str, rounds: int, *options: str) -> int:
        values = [*settings, f"rounds={rounds}"]
        return cli.main(["run", "--quiet", "--out", str(tmp_path / name), *options, "--set", *values])

    assert run("whole", 6) == run("more", 3) == 0
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["rounds"] == 3
    assert run("more", 6, "--resume") == 0
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    more, whole = (read_data(tmp_path / name) for name in ("more", "whole"))
    same = more.keys() - {"started", "config_sha256", "sha256"}
    assert {key: more[key] for key in same} == {key: whole[key] for key in same}
    assert len(more["config_sha256"]) == 2 and more["config_sha256"][1:] == whole["config_sha256"]
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["rounds"] == 6
    capsys.readouterr()
    assert run("more", 3, "--resume") == 2
    assert "rounds must be 6" in capsys.readouterr().err
