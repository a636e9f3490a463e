"""A run that is continued with more rounds."""

import json

from fedjax_lora import cli
from fedjax_lora.build import build
from fedjax_lora.config import load_config
from fedjax_lora.presets import preset
from toy import SETTINGS


def test_an_ended_run_may_get_more_rounds_where_no_rate_depends_on_them(tmp_path, monkeypatch, capsys):
    """Oracle: the run that had as many from the start; both evaluate in the same rounds. Compiled once for all."""
    settings = [*SETTINGS, "local.optimizer.schedule=constant"]
    simulation = build(load_config(None, settings, base=preset("digits")))
    monkeypatch.setattr("fedjax_lora.runner.build", lambda config: simulation)

    def run(name: str, rounds: int, *options: str) -> int:
        values = [*settings, f"rounds={rounds}"]
        return cli.main(["run", "--quiet", "--out", str(tmp_path / name), *options, "--set", *values])

    assert run("whole", 6) == run("more", 3) == 0
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["rounds"] == 3
    assert run("more", 6, "--resume") == 0
    for name in ("metrics.jsonl", "config.yaml", "data.json"):
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["rounds"] == 6
    capsys.readouterr()
    assert run("more", 3, "--resume") == 2
    assert "rounds must be 6" in capsys.readouterr().err
