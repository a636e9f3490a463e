"""A run's folder damaged at random, then resumed: the run that was never disturbed, bit for bit, or one clear line."""

import os
import random
import shutil
import warnings

import pytest
from rich.console import Console

import toy
from fedjax_lora.app import runner
from fedjax_lora.io.run_files import read_metrics, read_summary
from fedjax_lora.report.runs import load_runs

CONSOLE = Console(quiet=True)
SAME = ("final_accuracy", "best_accuracy", "total_uplink_bits", "total_latency_s", "rounds", "initial_accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has ended and one that was interrupted in its last segment; the same simulation serves every one."""
    folder = tmp_path_factory.mktemp("runs")
    config = toy.config("rounds=6", "engine.eval_every=2")
    simulation = runner.build(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "build", lambda config, methods: simulation)
        patch.setattr(runner, "write_report", lambda folders, path: path.write_text("report"))
        runner.run(config, folder / "ended", False, CONSOLE)
        segments = simulation.segments

        def interrupted(state, rounds):
            for state, metrics in segments(state, rounds):
                if int(state.round) == 6:
                    raise KeyboardInterrupt
                yield state, metrics

        with pytest.MonkeyPatch.context() as cut:
            cut.setattr(simulation, "segments", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner.run(config, folder / "cut", False, CONSOLE)
        yield config, folder


def flip(path, chance):
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 4, 64])):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def gone(path, chance):
    path.unlink()


def folder_gone(path, chance):
    shutil.rmtree(path.parent)


def torn(path, chance):
    with (path.parent / path.name).open("ab") as file:
        file.write(b'{"round": 9, "train_l')


def damage(folder, chance):
    """One of a run's files, of a checkpoint as often as not, damaged in one of five ways."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    held = [path for path in files if "checkpoints" in path.parts]
    path = chance.choice(held if chance.random() < 0.5 else files)
    ways = [flip, truncate, gone, torn] + ([folder_gone] if path.parent != folder else [])
    chance.choice(ways)(path, chance)


def resumed(config, folder):
    """Whether the run went on to its end; else it was refused in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            runner.run(config, folder, True, CONSOLE)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            return False
    assert all("\n" not in str(warning.message) for warning in caught)
    return True


def results(folder):
    summary = read_summary(folder)
    assert summary is not None
    return [summary[key] for key in SAME], (folder / "metrics.jsonl").read_bytes()


def damaged_copy(whole, folder, seed):
    """A copy with one or two damages, and whether all of them are to what a run can do without."""
    chance = random.Random(seed)
    shutil.copytree(whole / chance.choice(["ended", "cut"]), folder)
    needed = [folder / name for name in ("config.yaml", "data.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in needed]
    for _ in range(chance.choice([1, 1, 2])):
        damage(folder, chance)
    return [path.read_bytes() if path.is_file() else None for path in needed] == before


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_run_ends_as_the_undisturbed_one_or_in_one_line(runs, tmp_path, seed):
    config, whole = runs
    folder = tmp_path / "run"
    can_go_on = damaged_copy(whole, folder, seed)
    if resumed(config, folder):
        assert results(folder) == results(whole / "ended")
    else:
        assert not can_go_on


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("seed", range(30))
def test_the_report_of_a_damaged_run_has_the_undisturbed_numbers_or_is_one_line(runs, tmp_path, seed):
    _, whole = runs
    folder = tmp_path / "run"
    damaged_copy(whole, folder, seed)
    try:
        (run,) = load_runs([folder])
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert run.metrics == read_metrics(whole / "ended")[: len(run.metrics)]
