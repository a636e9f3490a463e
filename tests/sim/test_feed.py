"""A training pool on the host: the same bits as on the device, of which a part alone is there."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_lora.app import cli, dry_run, planner
from fedjax_lora.app.targets import Chip, Target
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.groups import grouped
from fedjax_lora.core import trees
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.keys import round_keys
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.feed import Feed
from fedjax_lora.sim.memory import run_terms
from fedjax_lora.sim.selection import sample

HOST = "engine.data=host"
POPULATION = ("clients.partition={kind: sampled, examples: 6}", "clients.count=50", "clients.per_round=3", "rounds=8")
CASES = {
    "drawn from ids": POPULATION,
    "listed, with parts of their own and padding": (
        "clients.per_round=3",
        "engine.client_chunk=2",
        "aggregation.name=fedsa",
        "sparsifier.name=dense",
        "rounds=8",
    ),
    "everyone": ("rounds=8",),
}


def feed_of(sim: Simulation) -> Feed:
    assert sim.feed is not None
    return sim.feed


def same(found, expected) -> None:
    """Bit for bit, NaN where the other is."""

    def words(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(words(x), words(y)), found, expected)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_a_pool_on_the_device(case):
    """Oracle: the same configuration with the pool on the device; two whole segments and a part of one."""
    host, device = (toy.simulation(*CASES[case], *more) for more in ([HOST], []))
    state = host.init(jax.random.key(3))
    found, expected = host.run(state, 8), device.run(state, 8)
    same(found, expected)
    assert np.isfinite(found[1].methods["task/worst_tenth_accuracy"][[2, 5, 7]]).all()


def test_a_run_goes_on_from_the_middle_of_a_segment():
    """Oracle: the run in one go, with the pool on the device; and its state scored alone."""
    host, device = (toy.simulation(*POPULATION, *more) for more in ([HOST], []))
    state = host.init(jax.random.key(4))
    middle, _ = host.run(state, 2)
    found, rows = host.run(middle, 6)
    expected, told = device.run(state, 8)
    same(found, expected)
    np.testing.assert_array_equal(rows.train_loss, told.train_loss[2:])
    same(host.scores(found), device.scores(expected))


def test_a_folder_is_continued(tmp_path, monkeypatch):
    """Oracle: the metrics of a run in one go, with the pool on the device, byte for byte."""

    def run(name: str, place: str, rounds: int, *options: str) -> bytes:
        settings = [*POPULATION, "local.optimizer.schedule=constant", f"engine.data={place}"]
        simulation = toy.simulation(*settings)
        monkeypatch.setattr("fedjax_lora.app.runner.build", lambda config, methods: simulation)
        values = [*toy.SETTINGS, *settings, f"rounds={rounds}"]
        assert cli.main(["run", "--quiet", "--out", str(tmp_path / name), *options, "--set", *values]) == 0
        return (tmp_path / name / "metrics.jsonl").read_bytes()

    whole, part = run("whole", "device", 6), run("more", "host", 3)
    assert whole.startswith(part) and run("more", "host", 6, "--resume") == whole


def test_the_device_holds_what_a_segment_needs():
    """Oracle: 9 clients of 6 examples, by hand: in the program's arguments, and in what is alive beside it."""
    sim = toy.simulation(*POPULATION, HOST)
    feed, known = feed_of(sim), {id(array) for array in jax.live_arrays()}
    assert (feed.clients, feed.examples) == (9, 54)
    state = sim.init(jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(sim.program.lower(sim.world, state).in_avals)]
    size = len(feed.pool["label"])
    assert size > 1000 and (54, 8, 8, 1) in shapes and not [shape for shape in shapes if size in shape]
    for _ in sim.segments(state, 6):
        alive = [array for array in jax.live_arrays() if id(array) not in known]
        assert not [array for array in alive if size in array.shape]
        assert len([array for array in alive if array.shape == (54, 8, 8, 1)]) <= 2  # of this segment and the next
    assert all(isinstance(leaf, np.memmap) for leaf in feed.pool.values())


def test_the_part_of_a_segment_holds_the_examples_of_its_cohorts():
    """Oracle: the round's own choice, round by round, and the rows that clients draw from their ids."""
    sim, device = (toy.simulation(*POPULATION, *more) for more in ([HOST], []))
    state, whole = sim.init(jax.random.key(5)), device.world.data
    worlds = feed_of(sim).worlds(sim.world, sim.layout, state.key, 1, [2], sim.program.everywhere)
    (data,) = (world.data for world in worlds)
    for number in (1, 2):
        ids = sample(sim.layout, 50, round_keys(state.key, jnp.int32(number)))[0]
        for name, leaf in data.train.items():
            np.testing.assert_array_equal(leaf[data.index[ids]], whole.train[name][whole.index[ids]])


def test_the_next_part_is_made_while_a_segment_runs(monkeypatch):
    """Oracle: a part that is made before it is asked for."""
    sim = toy.simulation(*POPULATION, HOST)
    feed, second, calls = feed_of(sim), threading.Event(), []
    made = feed._part

    def part(*given):
        calls.append(given)
        if len(calls) == 2:
            second.set()
        return made(*given)

    monkeypatch.setattr(feed, "_part", part)
    key = sim.init(jax.random.key(0)).key
    worlds = feed.worlds(sim.world, sim.layout, key, 0, [3, 3, 3], sim.program.everywhere)
    next(worlds)
    assert second.wait(60) and len(calls) == 2
    assert len(list(worlds)) == 2 and len(calls) == 3


def test_memory_is_foreseen_where_it_is():
    """Oracle: the bytes of the arrays; a dry run by shapes alone."""
    settings = toy.config(*POPULATION, HOST)
    sim = build(settings, draft=True)
    held = next(term.bytes for term in run_terms(sim.needs, sim.layout) if term.kind == "data")
    data = sim.world.data
    assert held == trees.num_bytes(data) + trees.num_bytes((data.train, data.index.ids, data.index.rows))
    small = Target("small", Chip(1e12, 1e12, 1e9, "this test"), 1, None)
    found = dry_run.dry_run(settings, small)
    assert found.host_bytes == sum(leaf.nbytes for leaf in feed_of(sim).pool.values()) and found.kinds["data"] == held
    assert any(line.startswith("on the host: training pool ") for line in found.lines())
    assert not any("on the host" in line for line in dry_run.dry_run(toy.config(), small).lines())


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("control.name=best_channel", "engine.data must be device where control.name is best_channel, which chooses "),
        ("arrival={name: buffered, buffer: 2}", "engine.data must be device where arrival.name is buffered, in which "),
        ("training={name: split, device_layers: 1}", "engine.data must be device where training.name is split, which "),
        ("engine.data=disk", "engine.data must be one of device, host, got 'disk'"),
    ],
)
def test_what_needs_more_than_known_cohorts_is_refused_in_one_line(setting, line):
    with pytest.raises(ConfigError) as error:
        build(toy.config("clients.per_round=3", HOST, setting), draft=True)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_plan_and_a_sweep_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^engine\.data must be device, for a plan, got 'host'$"):
        planner.check(load_config(None, [HOST, "control.name=tsfa", "control.latency_budget_s=1"]))
    groups, refused = grouped([toy.config(HOST, f"seed={seed}") for seed in (1, 2)])
    assert groups == [] and sorted(refused) == [0, 1]
    assert {str(error) for error in refused.values()} == {"engine.data must be device in a sweep, got 'host'"}
