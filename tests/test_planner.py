"""The plan from end to end on a toy, through the command line: what it writes, and one line for each mistake."""

import contextlib
import dataclasses
import io
import itertools
import json
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from fedjax_lora.app import cli, planner
from fedjax_lora.app.planner import round_factors
from fedjax_lora.config.experiment import ConfigError, load_config
from fedjax_lora.config.presets import preset
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.core.progress import Progress
from fedjax_lora.io.plan import apply_plan, effects_of_plan, effects_of_run, read_plan, write_plan
from fedjax_lora.planning import bound, rank_search
from fedjax_lora.planning.rollout import Rollout
from fedjax_lora.report.plan import binding, plan_table, plot_plan
from fedjax_lora.report.tables import MISSING
from toy import SETTINGS

PLANNED = [
    *(setting for setting in SETTINGS if not setting.startswith("control.")),
    "control.name=tsfa",
    "control.latency_budget_s=5.0",
    "rounds=3",
    "lora.targets=[query]",
    "plan.pilot_rounds=1",
    "plan.paths=1",
    "plan.candidates=[1, 3]",
    "plan.rollout_rounds=1",
    "plan.seeds=2",
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Folder of a plan by rollout, which has the bound's rows too, and what the command printed."""
    folder, said = tmp_path_factory.mktemp("plans") / "toy", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(["plan", "--out", str(folder), "--set", *PLANNED, "plan.objective=rollout"]) == 0
    return folder, said.getvalue()


@pytest.fixture(scope="module")
def planned(printed):
    """The folder alone."""
    return printed[0]


def test_a_plan_holds_a_row_for_each_candidate(planned):
    plan = read_plan(planned / "plan.json")
    assert [row["rank"] for row in plan.rows] == [1, 3]
    assert (planned / "plan.png").read_bytes()[:4] == b"\x89PNG"
    for row in plan.rows:
        # Oracle: the terms again, from what the row itself says was measured; without the errors, which are no field.
        measured = bound.Measured(**{name: row[name] for name in bound.Measured._fields})
        terms = bound.terms(measured, 0.0, 0.0, np.array(plan.factors))
        np.testing.assert_allclose([terms.descent, terms.noise], [row["descent"], row["noise"]], rtol=1e-5)
        total = row["descent"] + row["noise"] + row["sparsification"] + row["covariance"]
        np.testing.assert_allclose(row["bound"], total, rtol=1e-5)
        np.testing.assert_allclose(row["rank_cost"], (1 - row["share"]) * (row["descent"] + row["noise"]), rtol=1e-5)
        np.testing.assert_allclose(row["score"], np.mean(row["losses"]), rtol=1e-6)
        assert len(set(row["losses"])) == 2 and row["rollout_latency_s"] > 0
    # Oracle: SciPy's standard error of the pairs, by the losses of the file.
    least = min(plan.rows, key=lambda row: row["score"])
    for row in plan.rows:
        over = np.subtract(row["losses"], least["losses"])
        np.testing.assert_allclose(row["excess"], over.mean(), rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(row["excess_error"], stats.sem(over), rtol=1e-3, atol=1e-7)
    assert all(row["within_budget"] for row in plan.rows)


def test_a_plan_is_read_as_it_was_written(planned, tmp_path):
    plan = read_plan(planned / "plan.json")
    write_plan(plan, tmp_path / "again.json")
    assert read_plan(tmp_path / "again.json") == plan


def test_a_plan_as_json_is_one_document(planned, tmp_path, monkeypatch, capsys):
    """Oracle: the file that the command writes; the plan itself is one made before."""
    made, out = read_plan(planned / "plan.json"), tmp_path / "plan"
    monkeypatch.setattr(planner, "plan", lambda config, console, methods=(): made)
    assert cli.main(["plan", "--json", "--out", str(out), "--set", *PLANNED]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {**json.loads((out / "plan.json").read_text()), "folder": str(out)}
    assert "take it with" in captured.err
    assert cli.main(["plan", "--quiet", "--out", str(out), "--set", *PLANNED]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_run_takes_rank_V_and_first_queue_of_a_plan_and_says_what_binds(printed, tmp_path, capsys):
    """The command is the one that the plan's last line says, with a folder of its own."""
    planned, said = printed
    out, command = tmp_path / "run", said.splitlines()[-1].partition("take it with fedjax-lora ")[2]
    assert cli.main([*shlex.split(command), "--out", str(out)]) == 0
    plan, config = read_plan(planned / "plan.json"), load_config(out / "config.yaml")
    assert isinstance(config.control, TsfaConfig)
    assert (config.lora.rank, config.control.V, config.control.queue_s) == (plan.rank, plan.V, plan.queue_s)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = effects_of_run(plan, lines)
    # Oracle: the squares of the log; the rank's effect is what is saved at `kappa = 1`.
    measured = bound.Measured(**{name: plan.chosen[name] for name in bound.Measured._fields})
    energies = [np.array([line[n] ** 2 for line in lines]) for n in ("sparsification_error", "covariance_error")]
    terms, best = (bound.terms(m, *energies, np.array(plan.factors)) for m in (measured, measured._replace(share=1.0)))
    effects = {
        "rank": terms.descent + terms.noise - best.descent - best.noise,
        "sparsification": terms.sparsification,
        "covariance": terms.covariance,
    }
    np.testing.assert_allclose(found[1:], list(effects.values()), rtol=1e-3)
    np.testing.assert_allclose(sum(found), terms.total, rtol=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plan"] == {"rank": plan.rank, "V": plan.V, "queue_s": plan.queue_s}
    np.testing.assert_allclose([summary["bound_effects"][name] for name in effects], list(effects.values()), rtol=1e-3)
    report = (out / "report.html").read_text()
    assert f"rank {plan.rank}, V {plan.V:.6g}, queue_s {plan.queue_s:.6g}" in report and "bound, by effect" in report
    said = capsys.readouterr().out
    assert f"binding: {max(effects, key=lambda name: effects[name])}" in said
    assert f"by the plan: rank {plan.rank}, V {plan.V:.6g}, first queue {plan.queue_s:.6g} s" in said


QUIET = Progress(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def surveyed():
    """A configuration, and pilots and channel of its three candidates."""
    config = load_config(None, [*PLANNED, "plan.candidates=[1, 2, 4]"], base=preset("digits-tsfa"))
    return config, planner.survey(config, QUIET)


def chosen(surveyed, budget_s, **options):
    config, known = surveyed
    control = dataclasses.replace(config.control, latency_budget_s=budget_s)
    config = dataclasses.replace(config, control=control, plan=dataclasses.replace(config.plan, **options))
    return planner.choose(known, config, QUIET)


def by_bound(surveyed, budget_s, search="grid"):
    return chosen(surveyed, budget_s, search=search)


@pytest.fixture(scope="module")
def by_budget(surveyed):
    """Plans by bound and grid, from a loose budget to one that nothing meets."""
    return {budget_s: by_bound(surveyed, budget_s) for budget_s in (20.0, 5.0, 4.0, 3.0, 0.01)}


def test_a_plan_by_bound_is_the_least_bound_within_the_budget(by_budget):
    """Oracle: Python's least of the rows, each of which has a V of the grid: relative tails have the budget squared."""
    for budget_s, plan in by_budget.items():
        within = [row for row in plan.rows if row["latency_s"] <= 1.05 * budget_s]
        assert plan.within_budget == bool(within) == (budget_s > 0.01)
        least_s = min(row["latency_s"] for row in plan.rows)
        near = within or [row for row in plan.rows if row["latency_s"] <= 1.05 * least_s]
        best = min(near, key=lambda row: row["bound"])
        assert (plan.rank, plan.V, plan.queue_s) == (best["rank"], best["V"], best["queue_s"])
        assert (plan.queue_s > 0) == (plan.chosen["keep_ratio"] < 1)
        for row in plan.rows:
            assert np.isclose(row["V"] / budget_s**2, rank_search.WEIGHTS, rtol=1e-3).any()
            assert row["score"] == row["bound"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_rollouts_overrule_the_bound_where_they_can_tell(surveyed, by_budget, monkeypatch, seeds):
    """Oracle: rollouts made up; as good as each other, then worse in every seed at the rank that the bound chose."""
    plan, losses = by_budget[20.0], np.ones((3, seeds), np.float32)
    assert all(row["within_budget"] for row in plan.rows)
    monkeypatch.setattr(planner, "roll_out", lambda *_: Rollout(*[jnp.array(losses)] * 3))
    equal = chosen(surveyed, 20.0, objective="rollout", seeds=seeds)
    assert equal.rank == plan.rank
    losses[plan.rows.index(plan.chosen)] += 0.1
    overruled = chosen(surveyed, 20.0, objective="rollout", seeds=seeds)
    others = [row for row in plan.rows if row is not plan.chosen]
    assert overruled.rank == min(others, key=lambda row: row["bound"])["rank"] != plan.rank
    assert [row["excess_error"] is None for row in overruled.rows] == [seeds == 1] * 3
    cells = [cell for column in plan_table(overruled).columns for cell in column.cells]
    assert any(str(cell).startswith("0.1000") for cell in cells)
    assert any("±" in str(cell) for cell in cells) == (seeds > 1)


def test_a_tighter_budget_never_chooses_a_higher_rank_nor_a_longer_round(by_budget):
    """Law, on the same pilots and fading."""
    plans = list(by_budget.values())
    for loose, tight in itertools.pairwise(plans):
        assert tight.rank <= loose.rank
        assert tight.chosen["latency_s"] <= loose.chosen["latency_s"] * 1.0001


def test_the_gradient_search_ends_within_one_candidate_of_the_grid(surveyed, by_budget):
    """Oracle: the grid, at a rank whose latency is within the budget, with the V that the search or the grid found."""
    for budget_s in (20.0, 4.0, 0.01):
        grid, found = by_budget[budget_s], by_bound(surveyed, budget_s, "gradient")
        ranks = [row["rank"] for row in grid.rows]
        assert abs(ranks.index(found.rank) - ranks.index(grid.rank)) <= 1
        assert found.within_budget == (budget_s > 0.01)
        assert found.chosen["latency_s"] <= 1.05 * max(budget_s, min(row["latency_s"] for row in grid.rows))
        assert found.chosen["bound"] < 1.05 * next(r["bound"] for r in grid.rows if r["rank"] == found.rank)


def test_what_binds_in_a_plan_is_the_largest_effect_of_its_row(by_budget):
    """Oracle: the row's own terms."""
    plan = by_budget[5.0]
    row, found = plan.chosen, effects_of_plan(plan)
    expected = {
        name: row[key] for name, key in (("rank", "rank_cost"), *((n, n) for n in ("sparsification", "covariance")))
    }
    np.testing.assert_allclose(found[1:], list(expected.values()), rtol=1e-4)
    np.testing.assert_allclose(sum(found), row["bound"], rtol=1e-4)
    assert binding(found).endswith(f"binding: {max(expected, key=lambda name: expected[name])}")


def test_a_candidate_whose_pilot_diverged_is_passed_over(surveyed, tmp_path):
    """By definition: without a bound it is not chosen, by either search; the plan is shown and read with gaps."""
    config, known = surveyed
    whole = by_bound(surveyed, 5.0)
    worst = whole.rows.index(whole.chosen)
    measured = known.candidates.measured
    broken = measured._replace(movement=measured.movement.at[worst].set(np.nan))
    known = known._replace(candidates=known.candidates._replace(measured=broken))
    for search in ("grid", "gradient"):
        plan = by_bound((config, known), 5.0, search)
        assert plan.rank != whole.rank and plan.rows[worst]["bound"] is None
        assert np.isfinite(plan.chosen["bound"])
    gaps = {"excess": None, "excess_error": None}
    plan = plan._replace(objective="rollout", rank=whole.rank, rows=[row | gaps for row in plan.rows])
    write_plan(plan, tmp_path / "plan.json")
    plot_plan(plan, tmp_path / "plan.png")
    assert MISSING in [cell for column in plan_table(plan).columns for cell in column.cells]
    log = [{"sparsification_error": 0.1, "covariance_error": 0.1}] * 3
    assert binding(effects_of_run(read_plan(tmp_path / "plan.json"), log)).endswith("binding: not known")


def test_pilots_that_go_nowhere_are_one_line(capsys, tmp_path):
    settings = [*PLANNED, "local.optimizer={name: sgd, learning_rate: 1e12}"]
    line = one_line(capsys, ["plan", "--out", str(tmp_path / "plan"), "--set", *settings])
    assert (
        "local.optimizer.learning_rate must be one with which the pilot moves downhill" in line
        and "1000000000000.0" in line
    )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_hold_a_plan_is_said_before_the_pilot(capsys, tmp_path):
    (tmp_path / "file").touch()
    line = one_line(capsys, ["plan", "--out", str(tmp_path / "file"), "--set", *PLANNED])
    assert str(tmp_path / "file") in line and "must be a folder" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    line = one_line(capsys, ["plan", "--out", str(tmp_path / "run"), "--set", *PLANNED])
    assert str(tmp_path / "run") in line and "got that of a run" in line


def one_line(capsys, arguments):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_a_plan_of_another_configuration_is_refused(planned, capsys, tmp_path):
    path = str(planned / "plan.json")
    command = ["run", "--out", str(tmp_path / "run"), "--plan", path, "--set", *PLANNED]
    line = one_line(capsys, [*command, "control.latency_budget_s=6.0"])
    assert all(part in line for part in (path, "control.latency_budget_s", "6.0", "5.0")), line
    assert list(tmp_path.iterdir()) == []


def test_what_a_plan_does_not_depend_on_may_differ(planned):
    plan = read_plan(planned / "plan.json")
    changed = load_config(
        None,
        [*PLANNED, "lora.rank=1", "control.V=3.0", "control.queue_s=2.0", "engine.eval_every=2", "plan.seeds=5"],
        base=preset("digits-tsfa"),
    )
    applied = apply_plan(plan, changed, "plan.json")
    assert isinstance(applied.control, TsfaConfig)
    assert (applied.lora.rank, applied.control.V, applied.control.queue_s) == (plan.rank, plan.V, plan.queue_s)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 2}', "null"])
def test_a_damaged_plan_is_one_line(capsys, tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    line = one_line(capsys, ["run", "--out", str(tmp_path / "run"), "--plan", str(path)])
    assert str(path) in line and "must be" in line


@pytest.mark.parametrize("factors", [[1.0], [1.0, 1.0, -0.1], [1.0, 2.0, 1.0], [1.0, float("nan"), 1.0], None])
def test_a_plan_without_a_factor_for_each_round_is_one_line(planned, capsys, tmp_path, factors):
    found = json.loads((planned / "plan.json").read_text()) | {"factors": factors}
    (tmp_path / "plan.json").write_text(json.dumps(found))
    line = one_line(capsys, ["run", "--out", str(tmp_path / "run"), "--plan", str(tmp_path / "plan.json")])
    assert "must be what `fedjax-lora plan` wrote" in line


@pytest.mark.parametrize("changed", [{"queue_s": -1.0}, {"queue_s": None}, {"V": -1.0}, {"V": float("nan")}])
def test_a_plan_whose_V_or_queue_is_none_is_one_line(planned, capsys, tmp_path, changed):
    found = json.loads((planned / "plan.json").read_text()) | changed
    (tmp_path / "plan.json").write_text(json.dumps(found))
    line = one_line(capsys, ["run", "--out", str(tmp_path / "run"), "--plan", str(tmp_path / "plan.json")])
    assert "must be what `fedjax-lora plan` wrote" in line


def test_a_plan_with_a_number_missing_is_one_line(planned, capsys, tmp_path):
    found = json.loads((planned / "plan.json").read_text())
    for row in found["rows"]:
        del row["smoothness"]
    (tmp_path / "plan.json").write_text(json.dumps(found))
    line = one_line(capsys, ["run", "--out", str(tmp_path / "run"), "--plan", str(tmp_path / "plan.json")])
    assert "smoothness" in line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["control.name=fixed"], ["control.name must be tsfa", "'fixed'"]),
        (["plan.candidates=[16]"], ["plan.candidates", "lora.max_rank = 4", "16"]),
        (["plan.serach=grid"], ["plan.serach", "plan.search"]),
        (["lora.client_ranks=[1, 2]"], ["lora.client_ranks", "(1, 2)"]),
        (["control.energy_budget_j=1.0"], ["control.energy_budget_j must be null", "1.0"]),
        (["wireless.retransmissions=2"], ["wireless.retransmissions must be 0", "2"]),
        (["server.name=momentum"], ["server.name must be sgd", "'momentum'"]),
        (
            ["aggregation.name=fedsa", "sparsifier={name: dense}"],
            ["aggregation.name must be one of", "lora_fair, for a plan", "'fedsa'"],
        ),
        (["sparsifier={name: soft, error_feedback: true}"], ["sparsifier.error_feedback must be false", "True"]),
        (["aggregation.name=hetlora"], ["aggregation.prune must be 1.0", "0.99"]),
        (
            ["aggregation={name: fedex, start: keep}", "sparsifier={name: dense}"],
            ["aggregation.start must be one of average, reinit", "'keep'"],
        ),
        (["server.learning_rate=0.5"], ["server.learning_rate must be 1.0", "0.5"]),
        (["plan.paths=100000000000"], ["memory must hold about", "lower plan.paths, got 100000000000"]),
        (["plan.pilot_rounds=3"], ["plan.pilot_rounds must be below rounds = 3", "3"]),
        (
            ["plan.objective=rollout", "plan.rollout_rounds=4"],
            ["plan.rollout_rounds must be at most rounds = 3", "4"],
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_leaves_nothing(capsys, tmp_path, settings, expected):
    settings = [s for s in PLANNED if not (settings == ["control.name=fixed"] and s.startswith("control."))] + settings
    line = one_line(capsys, ["plan", "--out", str(tmp_path / "plan"), "--set", *settings])
    assert all(part in line for part in expected), line
    assert list(tmp_path.iterdir()) == []


def test_rounds_are_counted_by_the_schedule():
    """Oracle: a line that falls to 0 over the steps, and its mean in each round."""
    config = load_config(None, ["rounds=10", "local.steps=4", "local.optimizer.schedule=linear"])
    expected = np.reshape([1 - i / 40 for i in range(40)], (10, 4)).mean(1)
    np.testing.assert_allclose(round_factors(config), expected, rtol=1e-5)
    np.testing.assert_array_equal(round_factors(load_config(None, ["rounds=10"])), np.ones(10))


def test_a_missing_plan_is_one_line():
    with pytest.raises(ConfigError, match="must be a readable file"):
        read_plan("/no/plan.json")


def test_a_plan_that_is_nested_too_deeply_is_one_line(tmp_path):
    (tmp_path / "plan.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"plan\.json must be what `fedjax-lora plan` wrote") as caught:
        read_plan(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
