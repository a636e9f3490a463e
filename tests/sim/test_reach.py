"""Notes on who cannot be heard, and on budgets that nobody keeps."""

from types import SimpleNamespace

import jax
import numpy as np

from fedjax_lora.sim.reach import alone, reach_notes
from toy import simulation

SPLIT = ("training=split", "sparsifier=dense", "control={name: split_lyapunov}")


def found(sim, state):
    return jax.jit(alone, static_argnums=0)(sim.make_parts, sim.world, state)


def test_what_a_client_takes_alone_is_what_rounds_of_one_client_take():
    """Oracle: the round itself, of the one client that is heard best, who has the whole band."""
    sim = simulation("training=split", "sparsifier=dense", "control={name: best_channel}", "clients.per_round=1")
    state = sim.init(jax.random.key(1))
    seconds, joules = found(sim, state)
    _, metrics = sim.run(state, 3)
    for number in range(3):
        assert np.isclose(seconds[number], metrics.latency_s[number], rtol=1e-4).any()
        assert np.isclose(joules[number], metrics.energy_j[number], rtol=1e-4).any()


def test_who_is_never_heard_and_what_nobody_keeps_is_said():
    """By hand: a client without any gain; budgets below all that one alone takes."""
    sim = simulation(*SPLIT)
    state = sim.init(jax.random.key(1))
    for own, name in zip(found(sim, state), ("latency_budget_s", "energy_budget_j"), strict=True):
        least = float(np.min(own))
        assert reach_notes(sim, state, SimpleNamespace(**{name: 1.01 * least})) == []
        (line,) = reach_notes(sim, state, SimpleNamespace(**{name: 0.5 * least}))
        assert line.startswith(f"control.{name} = ") and f" is below {least:.4g} {name[-1]}, " in line
        assert "\n" not in line
    deaf = state.methods["wireless"].replace(mean_gain=state.methods["wireless"].mean_gain.at[2].set(0.0))
    (line,) = reach_notes(sim, state.replace(methods={**state.methods, "wireless": deaf}), SimpleNamespace())
    assert line == "1 of 6 clients cannot be heard in any of 32 rounds: 2"
