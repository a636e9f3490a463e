"""What a run holds, by hand and against what XLA says of the compiled program; and what the machine is said to have."""

import math

import jax
import numpy as np
import pytest

from fedjax_lora.config.assemble import build
from fedjax_lora.core import memory
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.keys import round_keys
from fedjax_lora.core.memory import Term
from fedjax_lora.sim.cohort import device_mesh
from fedjax_lora.sim.memory import run_terms
from fedjax_lora.sim.round import train_cohort
from fedjax_lora.sim.selection import choose_cohort
from toy import config, parts, simulation


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 1000}


def test_what_cannot_fit_is_refused_with_the_remedy_of_the_largest_term(monkeypatch):
    """By hand: of a CPU's memory each device takes its part; the limit itself still fits."""
    terms = [Term(1e9, "lower this, got 7"), Term(3e9, "lower that, got 9")]
    monkeypatch.setattr(memory, "available_bytes", lambda: 8e9)
    memory.check(terms, 2)
    with pytest.raises(ValueError) as error:
        memory.check(terms, 3)
    assert str(error.value) == (
        "memory must hold about 12.00 GB, and 8.00 GB are available: lower that, got 9 (9.00 GB)"
    )


def test_accelerators_have_their_memory_each(monkeypatch):
    """By hand: ten devices of 1000 bytes hold 1000 on each."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()])
    memory.check([Term(1000, "")], 10)
    with pytest.raises(ValueError, match="are available: lower it"):
        memory.check([Term(1001, "lower it")], 10)


def test_a_containers_limit_counts_where_it_is_below_the_machines(monkeypatch, tmp_path):
    """By hand: the file of either version, `max` for none; the machine's own memory is the operating system's."""
    files = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", files)
    machine = memory.available_bytes()
    assert 2**27 < machine < math.inf
    files[0].write_text("max\n")
    np.testing.assert_allclose(memory.available_bytes(), machine, rtol=0.5)
    files[1].write_text("12345\n")
    assert memory.available_bytes() == 12345


@pytest.mark.filterwarnings("ignore:sparsifier")  # error feedback where clients sit out rounds: known to harm
@pytest.mark.parametrize("overrides", [(), ("arrival={name: buffered, buffer: 2}",)])
def test_what_a_population_keeps_is_foreseen_by_kind(overrides):
    """By hand: two copies of the memory and channels of a million clients, and of the models that three run with."""
    of = ("clients={count: 1000000, per_round: 3}", "clients.partition={kind: sampled, examples: 6}", *overrides)
    sim = build(config(*of, "sparsifier={name: soft, error_feedback: true}"), draft=True)
    terms = {
        term.kind: term
        for term in run_terms(sim.needs, sim.layout._replace(mesh=device_mesh(devices=jax.devices()[:1])))
    }
    model = sum(4 * leaf.size for leaf in jax.tree.leaves(sim.needs.state.adapters))
    assert terms["state of the clients"].bytes == 2e6 * (model + 4 + 4 + 8 + 4)
    assert terms["state of the clients"].remedy == "lower clients.count, got 1000000"
    if overrides:
        assert terms["models of running clients"].bytes == 2 * 3 * (model + 5 * 4 + 1)
        assert terms["models of running clients"].remedy == "lower clients.per_round, got 3"
    else:
        assert "models of running clients" not in terms


@pytest.fixture(scope="module")
def two_clients():
    """Each with several hundred images, all of which are in a batch; and the terms of their run."""
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "check", lambda terms, num_devices: held.append(terms))
        sim = simulation("clients.count=2", "local.batch_size=100000", "local.steps=3")
    return sim, held[-1]


@pytest.mark.parametrize("option", ["local.batch_size", "engine.eval_batch_size", "pretrain.batch_size"])
def test_a_run_beyond_the_memory_is_refused_before_it_is_compiled(two_clients, monkeypatch, option):
    """By definition: with no memory at all, the largest part is that of the option that was made huge.

    The fixture has left pretrained weights in the cache: only where their batch is another are they trained.
    """
    del two_clients
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    with pytest.raises(ConfigError) as error:
        simulation("clients.count=2", f"{option}=100000")
    assert f"lower {option}, got 100000" in str(error.value) and "\n" not in str(error.value)


def test_training_takes_what_xla_says_it_does(two_clients):
    """Oracle: what the compiled local training of a cohort takes beside its arguments.

    A batch of 100000 takes what the largest client's examples fill, and the estimate is not far above.
    """
    sim, terms = two_clients
    state = jax.eval_shape(sim.init, jax.random.key(0))

    def train(world, state):
        cohort = choose_cohort(parts(sim), world, state, round_keys(state.key, state.round))
        return train_cohort(parts(sim), world, state, cohort.start, cohort.clients, cohort.present, cohort.present)[0]

    found = jax.jit(train).lower(sim.world, state).compile().memory_analysis().temp_size_in_bytes
    (estimate,) = (term.bytes for term in terms if term.remedy == "lower local.batch_size, got 100000")
    assert 0.5 * found < estimate < 1.3 * found


def test_a_client_is_charged_for_what_it_holds_and_not_for_a_batch(two_clients):
    """Closed form: 3 steps of all its examples, 1e7 cycles each, on its own processor."""
    sim, _ = two_clients
    state = sim.init(jax.random.key(0))

    @jax.jit
    def start_s(world, state):
        return choose_cohort(parts(sim), world, state, round_keys(state.key, state.round)).radio.start_s

    count = np.asarray(sim.world.data.count, np.float64)
    assert count.min() < count.max()
    np.testing.assert_allclose(
        start_s(sim.world, state), 3 * count * 1e7 / np.asarray(state.methods["wireless"].cpu_hz), rtol=1e-6
    )
