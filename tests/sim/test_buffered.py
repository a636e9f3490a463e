"""Buffered arrivals: rounds as the limit of a full buffer, and a loop over events for all else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.exchange import Received
from fedjax_lora.core.types import Adapters
from fedjax_lora.sim.parts import Arrivals, Cohort
from fedjax_lora.sim.running import rebased

ALIKE = ("control={name: ideal, keep_ratio: 0.7}", "wireless={cpu_hz_min: 1e9, cpu_hz_max: 1e9}", "sparsifier=dense")
OF_CLIENTS = "clients.partition={kind: sampled, examples: 9}"


def run(*overrides, rounds=6, seed=0):
    sim = toy.simulation(*overrides)
    return sim.run(sim.init(jax.random.key(seed)), rounds)


@pytest.mark.parametrize("cohort", [6, 3])
def test_clients_of_one_speed_and_a_full_buffer_are_rounds(cohort):
    """Invariance, to the order of float32's sums: all end together, and begin again from the newest model."""
    of = (*ALIKE, f"clients.per_round={cohort}")
    (expected, rounds), (found, steps) = run(*of), run(*of, f"arrival={{name: buffered, buffer: {cohort}}}")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found.adapters, expected.adapters)
    np.testing.assert_array_equal(steps.uplink_bits, rounds.uplink_bits)
    np.testing.assert_array_equal(steps.downlink_bits, rounds.downlink_bits)
    np.testing.assert_allclose(steps.latency_s, rounds.latency_s, rtol=1e-6)
    np.testing.assert_array_equal(steps.methods["arrival/staleness"], 0)


def events(seconds, buffer, steps):
    """Waits and mean staleness of a loop over events, in float64: clients that always run, each as long as ever."""
    ends, version = np.array(seconds, np.float64), np.zeros(len(seconds), int)
    now, waits, staleness = 0.0, [], []
    for step in range(steps):
        first = np.sort(np.argsort(ends, kind="stable")[:buffer])
        after = max(now, ends[first].max())
        waits.append(after - now)
        staleness.append(np.mean(step - version[first]))
        for client in first:
            version[client] = step + (ends[client] >= after)
            ends[client] = max(ends[client], now) + seconds[client]
        now = after
    return waits, staleness


@pytest.mark.parametrize("buffer", [1, 2, 5])
def test_waits_and_staleness_are_those_of_a_loop_over_events(buffer):
    """Oracle: the loop above, on the seconds that the clients take for their steps, of 8 examples at 1e7 cycles."""
    of = ("control=ideal", OF_CLIENTS, f"arrival={{name: buffered, buffer: {buffer}}}", "wireless.cpu_hz_max=6e9")
    sim = toy.simulation(*of)
    state = sim.init(jax.random.key(1))
    waits, staleness = events(8e7 / np.asarray(state.methods["wireless"].cpu_hz, np.float64), buffer, 6)
    (last, steps), (middle, _) = sim.run(state, 6), sim.run(state, 3)
    np.testing.assert_allclose(steps.latency_s, waits, rtol=1e-4)
    np.testing.assert_allclose(steps.methods["arrival/staleness"], staleness)
    assert buffer == 1 or max(staleness) > 0
    np.testing.assert_array_equal(steps.participants, buffer)
    again = sim.run(middle, 3)[0]  # bit for bit
    jax.tree.map(np.testing.assert_array_equal, again.methods["arrival"], last.methods["arrival"])


def test_a_change_counts_by_its_staleness_on_the_newest_model():
    """By hand: of two clients, one on time and one two steps late at (1 + 2)^-0.5, whose changes are added to 10."""
    cohort = _cohort(version=jnp.array([3, 1]), discount=jnp.array([1.0, 3**-0.5]))
    trained = _filled(jnp.array([11.0, 7.0]))
    held, received = rebased(cohort, trained, Received(trained, {}))
    for found in (held, received.adapters):
        np.testing.assert_allclose(found.head["bias"][:, 0], [11.0, 10 + (7 - 5) * 3**-0.5], rtol=1e-6)
    assert rebased(cohort._replace(arrivals=None), trained, Received(trained, {}))[0] is trained


def _filled(values):
    return Adapters(modules={}, head={"bias": jnp.broadcast_to(values[..., None], (*values.shape, 3))})


def _cohort(version, discount):
    """A cohort before round 3: the newest model is 10 everywhere, and the clients started from 10 and 5."""
    given = dict.fromkeys(Cohort._fields)
    arrivals = dict.fromkeys(Arrivals._fields) | {"starts": _filled(jnp.array([10.0, 5.0]))}
    arrivals |= {"version": version, "discount": discount}
    return Cohort(**given | {"start": _filled(jnp.array(10.0)), "round": 3, "arrivals": Arrivals(**arrivals)})


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("arrival={name: buffered, buffer: 7}",), "arrival.buffer must be at most 6, the clients that run at once"),
        (("arrival={name: buffered, buffer: 0}",), "buffer must be at least 1, got 0"),
        (("arrival={name: buffered, exponent: -1}",), "exponent must be between 0 and 100, got -1.0"),
        (
            ("arrival={name: buffered, buffer: 2}", "control=round_robin"),
            "control.name is round_robin, which needs clients that begin and end each round together",
        ),
        (
            ("arrival={name: buffered, buffer: 2}", "training={name: split, device_layers: 1}"),
            "arrival.name is buffered, which needs clients that hold all adapters",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as caught:
        toy.simulation(*overrides)
    assert line in str(caught.value) and "\n" not in str(caught.value)
