"""Buffered arrivals: rounds as the limit of a full buffer, and a loop over events for all else."""

import jax
import numpy as np
import pytest

import toy

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
    _, steps = sim.run(state, 6)
    np.testing.assert_allclose(steps.latency_s, waits, rtol=1e-4)
    np.testing.assert_allclose(steps.methods["arrival/staleness"], staleness)
    assert buffer == 1 or max(staleness) > 0
    np.testing.assert_array_equal(steps.participants, buffer)
