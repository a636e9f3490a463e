"""Rollouts against the run that they shorten, round by round."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.planning.pilot import at_rank
from fedjax_lora.planning.rollout import roll_out
from fedjax_lora.sim.engine import first_state
from fedjax_lora.sim.round import make_round
from toy import simulation

ROUNDS, SEEDS, V = 2, 2, 0.3
CONTROL = "control={name: tsfa, latency_budget_s: 0.05, V: 7.0, queue_s: 1.0}"


def test_a_rollout_is_the_run_itself_with_its_first_queue():
    """Oracle: the round function called in a loop from the first state of a run with that V and first queue.

    The state that is handed over has another V and another queue.
    """
    sim = simulation(CONTROL)
    state = sim.init(jax.random.key(4))

    def rolled(queues_s):
        numbers = jnp.float32([2, 3]), jnp.full(2, V), jnp.float32(queues_s)
        return roll_out(sim, sim.world, state, *numbers, SEEDS, ROUNDS)

    queues_s = 20.0, 10.0
    found = rolled(queues_s)
    one_round = jax.jit(make_round(sim.make_parts))
    for i, rank in enumerate((2.0, 3.0)):
        chosen = {"control.V": np.float32(V), "control.queue_s": np.float32(queues_s[i])}
        first = first_state(sim.make_parts, 6, jax.random.key(4), {**sim.numbers, **chosen})
        for seed in range(SEEDS):
            start = dataclasses.replace(first, key=jax.random.fold_in(first.key, seed))
            now, latency = at_rank(start, jnp.float32(rank)), []
            for _ in range(ROUNDS):
                now, metrics = one_round(sim.world, now)
                latency.append(float(metrics.latency_s))
            np.testing.assert_allclose(found.latency_s[i, seed], np.mean(latency), rtol=1e-4)
            np.testing.assert_allclose(found.loss[i, seed], sim.evaluate(now)[0], rtol=1e-4)
    # And it matters: from an empty queue the first rounds send everything.
    assert (rolled((0.0, 0.0)).latency_s > 1.05 * found.latency_s).all()
