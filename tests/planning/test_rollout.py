"""Rollouts against the run that they shorten, round by round."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.control import TsfaConfig, tsfa_online
from fedjax_lora.planning.pilot import at_rank
from fedjax_lora.planning.rollout import roll_out
from fedjax_lora.sim.round import make_round
from toy import simulation

ROUNDS, SEEDS, V = 2, 2, 0.3


def test_a_rollout_is_the_run_itself_with_its_first_queue():
    """Oracle: the round function called in a loop from the state with the same key, rank and first queue.

    Neither the state that is handed over, which comes from another controller, nor the own controller has that queue.
    """
    control = TsfaConfig(V=V, latency_budget_s=0.05, queue_s=1.0)
    sim = simulation("control.name=fixed")
    state = sim.init(jax.random.key(4))

    def rolled(queues_s):
        ranks, all_V, make = jnp.float32([2, 3]), jnp.full(2, V), lambda V: tsfa_online.make(control, V)
        numbers = ranks, all_V, jnp.float32(queues_s)
        return roll_out(sim.parts, make, sim.score, sim.world, state, *numbers, SEEDS, ROUNDS)

    queues_s = 20.0, 10.0
    found = rolled(queues_s)
    one_round = jax.jit(make_round(sim.parts._replace(controller=tsfa_online.make(control))))
    for i, rank in enumerate((2.0, 3.0)):
        for seed in range(SEEDS):
            own = at_rank(dataclasses.replace(state, key=jax.random.fold_in(state.key, seed)), jnp.float32(rank))
            own, latency = dataclasses.replace(own, queue_s=jnp.float32(queues_s[i])), []
            for _ in range(ROUNDS):
                own, metrics = one_round(sim.world, own)
                latency.append(float(metrics.latency_s))
            loss, _ = jax.jit(sim.score)(sim.world.base, sim.world.data.test, own.adapters, own.hyper)
            np.testing.assert_allclose(found.latency_s[i, seed], np.mean(latency), rtol=1e-4)
            np.testing.assert_allclose(found.loss[i, seed], loss, rtol=1e-4)
    # And it matters: from an empty queue the first rounds send everything.
    assert (rolled((0.0, 0.0)).latency_s > 1.05 * found.latency_s).all()
