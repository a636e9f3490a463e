"""Notes on who cannot be heard, and on a budget that nobody keeps."""

import jax
import numpy as np

from fedjax_lora.sim.reach import alone_s, reach_notes
from toy import simulation

SPLIT = ("training=split", "sparsifier=dense", "control={name: split_lyapunov}")


def test_seconds_alone_are_those_of_rounds_of_one_client_each():
    """Oracle: the round itself, of the one client that is heard best, who has the whole band."""
    sim = simulation("training=split", "sparsifier=dense", "control={name: best_channel}", "clients.per_round=1")
    state = sim.init(jax.random.key(1))
    seconds = jax.jit(alone_s, static_argnums=0)(sim.make_parts, sim.world, state)
    _, metrics = sim.run(state, 3)
    for number in range(3):
        assert np.isclose(np.asarray(seconds[number]), metrics.latency_s[number], rtol=1e-4).any()


def test_who_is_never_heard_and_what_nobody_keeps_is_said():
    """By hand: a client without any gain; a budget below all seconds alone."""
    sim = simulation(*SPLIT)
    state = sim.init(jax.random.key(1))
    seconds = np.asarray(jax.jit(alone_s, static_argnums=0)(sim.make_parts, sim.world, state))
    assert reach_notes(sim, state, float(seconds.min()) * 1.01) == []
    (line,) = reach_notes(sim, state, float(seconds.min()) / 2)
    assert line.startswith("control.latency_budget_s = ") and "quickest client" in line and "\n" not in line
    deaf = state.methods["wireless"].replace(mean_gain=state.methods["wireless"].mean_gain.at[2].set(0.0))
    (line,) = reach_notes(sim, state.replace(methods={**state.methods, "wireless": deaf}), None)
    assert line == "1 of 6 clients cannot be heard in any of 32 rounds: 2"
