import json
import os
import subprocess
import sys

import pytest

from fedjax_lora.app import dry_run, targets
from fedjax_lora.app.cli import main
from fedjax_lora.core import memory, trees
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.sim.memory import run_terms
from oracles.processes import SMALL, started
from toy import SETTINGS, config

ARGUMENTS = ["run", "--dry-run", "--set", *SETTINGS]


def small(memory_bytes, count=1):
    """A device that is told of by its numbers alone."""
    return targets.Target("small", targets.Chip(memory_bytes, 1e12, 1e9, "this test"), count, None)


def test_a_gpu_is_foreseen_by_its_numbers_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """Oracles: the terms of `sim.memory`, and the roof line by hand."""
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, "--json", "--target", "gpu:h100x8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "gpu:h100x8" and found["fits"] and found["fitting"] is None
    assert found["needed_bytes"] == pytest.approx(sum(found["kinds"].values()))
    assert {"frozen base", "data", "state of the clients", "adapters"} <= set(found["kinds"])
    assert found["round_s"] == pytest.approx(max(found["flop"] / 989e12, found["bytes"] / 3350e9) / 8)
    assert found["chunk"] == 1 and found["cohort"] == 6 and found["trials"] > 8
    assert list(tmp_path.iterdir()) == []


def test_a_round_has_the_flop_of_its_clients_steps():
    """Invariance: twice the steps are twice the work of training, beside which a round of this size has little."""
    once, twice = (
        dry_run.round_work(dry_run.build(config(f"local.steps={steps}"), draft=True)).flop for steps in (8, 16)
    )
    assert 1.9 < twice / once < 2.0


def test_what_does_not_fit_is_told_with_the_largest_that_does():
    """Oracle: the same terms at the cohort and the chunk that are told, and at twice the cohort."""
    settings = config("clients.count=64", "engine.client_chunk=8", "engine.eval_batch_size=1")
    simulation = dry_run.build(settings, draft=True)
    layout = simulation.layout

    def held(cohort, chunk):
        return memory.total(run_terms(simulation.needs, layout._replace(cohort_size=cohort, chunk=chunk)))

    room = (held(16, 1) + held(32, 1)) / 2
    found = dry_run.dry_run(settings, small(room))
    assert not found.fits and found.fitting is not None
    assert found.fitting["cohort"] == 16 and held(16, found.fitting["chunk"]) <= room < held(32, 1)
    assert "does not fit" in found.lines()[0] and "clients.per_round=16" in found.lines()[-1]
    assert dry_run.dry_run(settings, small(1.0)).lines()[-1] == "no cohort fits"


def test_a_base_that_no_device_holds_is_told_with_the_devices_that_do():
    """Oracle: bytes of the whole base, of which each of two devices holds half but for vectors."""
    whole = trees.num_bytes(dry_run.build(config(), draft=True).world.base)
    target = small(0.6 * whole, count=4)
    one, two = (dry_run.dry_run(config(f"engine.model_devices={n}"), target) for n in (1, 2))
    assert one.model_devices == 2 and one.lines()[-1].endswith("it does with engine.model_devices=2")
    assert one.kinds["frozen base"] == whole and 0.5 <= two.kinds["frozen base"] / whole < 0.6
    assert two.model_devices is None and two.trials == one.trials // 2
    with pytest.raises(ConfigError, match=r"engine\.model_devices must divide the number of devices, 4, got 3"):
        dry_run.dry_run(config("engine.model_devices=3"), target)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "gpu:h100", "gpu:h100x0", "gpu:t4x1", "v5e:0x2", ""])
def test_a_target_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=f"--target must be KIND:XxY with a TPU of v5e, .*, got '{name}'"):
        targets.find(name)


def test_a_target_is_for_a_dry_run_alone(capsys):
    assert main(["run", "--target", "gpu:h100x8"]) == 2
    assert "--target is for --dry-run" in capsys.readouterr().err


def test_memory_that_is_foreseen_here_is_what_is_then_used(tmp_path):
    """Oracle: the most that the process of the run has held, as the operating system counts it, within 15 %."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "fedjax_lora.app.cli", "run", str(tmp_path / "small.yaml")]
    (said,) = started([([*command, "--dry-run", "--json"], {})])
    (ran,) = started([([*command, "--json", "--out", str(tmp_path / "run")], {})])
    foreseen, used = json.loads(said), json.loads(ran)
    assert foreseen["needed_bytes"] == pytest.approx(used["peak_memory_bytes"], rel=0.15)
    assert foreseen["round_s"] > 0


@pytest.mark.parametrize("preset", ["digits", "digits-tsfa"])
@pytest.mark.parametrize("target", ["v5e:2x2", "v5e:4x4", "v6e:2x4"])
def test_a_preset_is_compiled_for_a_slice_that_is_not_at_hand(target, preset):
    """Oracle: the compiler of TPUs, and the number of chips."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: make test-tpu installs it")
    command = [sys.executable, "-m", "fedjax_lora.app.cli", "run", "--dry-run", "--json", "--preset", preset]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--target", target], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["fits"] and found["memory_from"] == "by the compiler" and found["round_s"] > 0
