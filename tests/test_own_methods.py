"""The methods of `examples/methods` and the page that shows them: each keeps the laws, is chosen in YAML, and runs."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_lora.app import cli
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, load_config
from fedjax_lora.config.user_methods import load
from fedjax_lora.methods import Population, Radio
from fedjax_lora.testing import examples, laws, slots

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples" / "methods").glob("*.py"))
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
YAML = PAGE.split("```yaml\n")[1].split("```")[0]
SETTINGS = [setting for setting in toy.SETTINGS if not setting.startswith("control.")]
WIDTHS = {"query": (64, 64), "up": (64, 256)}


def methods(*names):
    """Of these files, or of all."""
    return load([str(path) for path in FILES if not names or path.stem in names]).methods


@pytest.fixture(scope="module")
def gains(tmp_path_factory):
    """Path of gains `[rounds, K]` for the six clients of the toy run, some of which are heard badly; and the table."""
    table = np.exp(np.random.default_rng(0).normal(-25.0, 1.5, (3, 6)))
    path = tmp_path_factory.mktemp("gains") / "gains.csv"
    np.savetxt(path, table, delimiter=",")
    return path, table


@pytest.fixture(scope="module")
def yaml(gains):
    """Path of the page's configuration, with the gains beside it."""
    path = gains[0].with_name("own.yaml")
    path.write_text(YAML.replace("gains.csv", str(gains[0])))
    return path


@pytest.fixture(scope="module")
def run(yaml):
    """A toy run of two rounds with the page's configuration."""
    own = methods()
    sim = build(load_config(yaml, SETTINGS, methods=own), methods=own)
    return sim, *sim.run(sim.init(jax.random.key(0)), 2)


def test_the_page_shows_the_files_as_they_are():
    """Oracle: the files; and every law by its name."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(FILES) >= 4
    for path in FILES:
        assert path.read_text(encoding="utf-8") in blocks, f"docs/methods.md must hold {path.name} as it is"
    for slot, of_slot in slots.LAWS.items():
        assert f"| `{slot}` | {'; '.join(of_slot)} |" in PAGE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_keeps_the_laws_of_its_slot(path, gains):
    """The oracle is each law."""
    (method,) = methods(path.stem)
    laws.check(method, method.options(gains=str(gains[0])) if path.stem == "recorded_gains" else None)


def test_a_run_of_four_counts_what_was_sent(run):
    """Oracle: b of three ranks in four layers, and the head, by hand; in bits of float32."""
    _, _, metrics = run
    values = 3 * 4 * sum(n_out for _, n_out in WIDTHS.values()) + 64 * 10 + 10
    sent = metrics.client_uplink_bits
    assert set(np.unique(sent)) == {32 * values}
    assert np.isfinite(metrics.train_loss).all() and np.isfinite(metrics.eval_accuracy[-1])
    # What was trained of a is lost, and says so; nothing of it has reached the server.
    assert (metrics.dropped_energy > 0).all()


def test_a_of_the_server_never_moves(run):
    """Oracle: the start, to the bit; b does move."""
    sim, state, _ = run
    start = sim.init(jax.random.key(0)).adapters.modules
    for name, after in state.adapters.modules.items():
        np.testing.assert_array_equal(after.a, start[name].a)
        assert np.any(np.asarray(after.b) != np.asarray(start[name].b))


def test_the_recorded_gains_decide_when_a_round_ends(run, gains):
    """Oracle: bits over Shannon's rate in NumPy, at the shares where all end together."""
    sim, _, metrics = run
    count = np.asarray(sim.world.data.count)
    start_s, power_w, noise_w_hz = 0.01 * 2 * np.minimum(count, 4), 10**-2, 10 ** (-174 / 10 - 3)
    for row in range(2):
        snr_hz, bits = power_w / noise_w_hz * gains[1][row], metrics.client_uplink_bits[row]
        end_s = float(metrics.latency_s[row])
        share_hz = [_band(bits[k] / (end_s - start_s[k]), snr_hz[k]) for k in range(6)]
        np.testing.assert_allclose(sum(share_hz), 1e6, rtol=1e-3)


def _band(rate_bps, snr_hz):
    """Hz at which a client has this rate, by bisection."""
    low, high = 0.0, 1e7
    for _ in range(100):
        mid = (low + high) / 2
        low, high = (mid, high) if mid * np.log2(1 + snr_hz / mid) < rate_bps else (low, mid)
    return high


def test_the_controllers_queue_is_carried_and_reported(run):
    """Oracle: the recursion of the queue in NumPy, of the energy that the rounds report."""
    _, state, metrics = run
    owed = 0.0
    for row in range(2):
        owed = max(owed + float(metrics.energy_j[row]) / 6 - 0.5, 0.0)
        np.testing.assert_allclose(metrics.methods["control/owed_j"][row], owed, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.methods["control"]["energy_j_queue"], owed, rtol=1e-5, atol=1e-7)


def test_a_longer_queue_keeps_fewer_ranks_and_leans_to_who_is_heard():
    """Closed forms: `r / (1 + haste * queue / budget)`; the best of two channels wins nearly always."""
    (method,) = methods("energy_queue")
    control = method.make(method.options(budget_j=2.0, haste=0.5), examples.context())
    for queue, kept in ((0.0, 3.0), (4.0, 1.5), (100.0, 1.0)):
        state = {"energy_j_queue": jnp.float32(queue)}
        np.testing.assert_allclose(control.allocate(state, examples.observation()).kept, kept, rtol=1e-6)
    radio = Radio(jnp.array([0.0, 1e2, 1e6]), jnp.zeros(3), jnp.float32(1e6), jnp.float32(0.01))
    clients = Population(jnp.arange(3), radio, jnp.full(3, 1 / 3), jnp.full(3, 3.0), jnp.full((3, 4), 1e5))
    first = {0.0: 0, 100.0: 0}
    for queue in first:
        for seed in range(20):
            priority, _ = control.schedule({"energy_j_queue": queue}, jax.random.key(seed), clients)
            assert priority[0] == -jnp.inf
            first[queue] += int(jnp.argmax(priority) == 2)
    assert 3 <= first[0.0] <= 17 and first[100.0] >= 19


def test_the_trimmed_mean_is_that_of_numpy():
    """Oracle: each value counted as often as it weighs, sorted and cut at both ends; and the median's limit."""
    method = methods("trimmed_mean")[0]
    trimmed_mean = sys.modules[method.make.__module__].trimmed_mean
    values = np.random.default_rng(1).normal(size=(4, 3, 2)).astype(np.float32)
    times = np.array([4, 3, 2, 1])
    whole = np.sort(np.repeat(values, times, 0), 0)
    weights = (times / 10).astype(np.float32)[:, None, None]
    for trim, cut in ((0.0, 0), (0.1, 1), (0.3, 3)):
        np.testing.assert_allclose(trimmed_mean(values, weights, trim), whole[cut : 10 - cut].mean(0), atol=1e-6)
    odd = values[:3]
    np.testing.assert_allclose(trimmed_mean(odd, np.full((3, 1, 1), 1 / 3), 0.49), np.median(odd, 0), atol=1e-5)
    np.testing.assert_array_equal(trimmed_mean(values, np.zeros((4, 1, 1)), 0.1), 0.0)


def test_the_command_line_runs_them(yaml, tmp_path, capsys):
    """Oracle: the files that were named and the options that they were run with, in the run's folder."""
    names = ["send_b", "trimmed_mean", "energy_queue", "recorded_gains"]
    files = [str(path) for path in FILES if path.stem in names]
    out = tmp_path / "run"
    named = [word for file in files for word in ("--methods", file)]
    command = ["run", str(yaml), "--out", str(out), "--quiet", *named, "--set", *SETTINGS, "rounds=2"]
    assert cli.main(command) == 0
    capsys.readouterr()
    held = json.loads((out / "data.json").read_text())["methods"]
    assert sorted(held) == sorted(files)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["control/owed_j"] >= 0
    assert "name: energy_queue" in (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "aggregation={name: trimmed_mean, trm: 0.1}",
            "aggregation.trm is not a known key, got it with value 0.1; did you mean aggregation.trim?",
        ),
        ("aggregation={name: trimmed_mean, trim: 0.5}", "aggregation.trim must be at least 0 and below 0.5, got 0.5"),
        ("aggregation={name: trimmed_mean, trim: half}", "aggregation.trim must be a finite number, got 'half'"),
        ("control={name: energy_queue, budget_j: 0}", "control.budget_j must be positive and finite, got 0.0"),
        ("wireless={name: recorded, gains: nowhere.npy}", "wireless.gains must be a .npy or .csv file of numbers, got"),
        ("wireless.name=recorded", "wireless.gains must be"),
        ("sparsifier=send_c", "sparsifier.name must be one of soft"),
    ],
)
def test_a_mistake_in_a_users_option_is_one_line(setting, message):
    """The oracle is the package's own methods, whose mistakes read alike."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting], methods=methods())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_gains_of_other_clients_are_one_line(yaml):
    own = methods()
    with pytest.raises(ConfigError) as caught:
        build(load_config(yaml, [*SETTINGS, "clients.count=5"], methods=own), methods=own)
    assert str(caught.value) == "wireless.gains must have a column for each of 5 clients, got 6"


def test_gains_that_are_no_table_are_one_line(tmp_path):
    method = methods("recorded_gains")[0]
    for name, table in (("cube.npy", np.ones((2, 2, 2))), ("below.npy", -np.ones((2, 2))), ("none.npy", [[np.nan]])):
        np.save(tmp_path / name, table)
        with pytest.raises(ValueError, match="gains must be a table"):
            method.options(gains=str(tmp_path / name))


def test_a_need_that_is_not_met_is_one_line():
    """Oracle: the catalogue's rule, by hand: with FedSA b stays at home, and nothing would be sent."""
    with pytest.raises(ConfigError, match=r"send_b, which needs a factor b that all clients share"):
        load_config(None, ["sparsifier=send_b", "aggregation=fedsa"], methods=methods())


def test_a_model_a_server_and_arrays_of_ones_own_run_together():
    """Oracle: the shades are told apart, by the page's own arrays; the step is no longer than it may be."""
    namespace: dict = {}
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "SHADES" in block)
    exec(compile(block, "docs/methods.md", "exec"), namespace)
    own = [*methods(), namespace["SHADES"]]
    settings = (
        "data.source=shades",
        "model={name: mlp, width: 12}",
        "server={name: clipped, max_norm: 0.05}",
        "lora.targets=[second]",
        "sparsifier=dense",
        "control=ideal",
    )
    sim = build(load_config(None, [*SETTINGS, *settings], methods=own), methods=own)
    start = sim.init(jax.random.key(0))
    state, metrics = sim.run(start, 2)
    assert np.isfinite(metrics.train_loss).all() and metrics.eval_accuracy[-1] > 0
    once, _ = sim.run(start, 1)
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: float(np.sum((x - y) ** 2)), once.adapters, start.adapters))
    assert 0 < sum(moved) ** 0.5 <= 0.05 * (1 + 1e-4)
    assert state.adapters.modules["second"].a.shape == (1, 12, 4)
