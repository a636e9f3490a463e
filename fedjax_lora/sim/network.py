"""The network without training: channels drawn round by round, and a controller that is played on them.

Example:
  >>> import jax
  >>> import jax.numpy as jnp
  >>> from fedjax_lora.control import FixedConfig, fixed
  >>> from fedjax_lora.core.learning import Work
  >>> from fedjax_lora.core.methods import Context
  >>> from fedjax_lora.core.network import Observation
  >>> from fedjax_lora.sim.network import delivered, draw_channel, play
  >>> from fedjax_lora.wireless.cell import WirelessConfig, make
  >>> context = Context(num_clients=8, cohort_size=4)
  >>> wireless, work = make(WirelessConfig(), context), Work(samples=jnp.full(8, 32.0))
  >>> cell = wireless.init(jax.random.key(0), jnp.arange(8))
  >>> drawn = draw_channel(wireless, work, cell, jax.random.key(1), jnp.float32(0), rounds=3, cohort_size=4)
  >>> def observe(drawn):
  ...     bits = jnp.tile(jnp.array([1e6, 1e6, 2e6]), (4, 1))  # 0, 1 and 2 ranks
  ...     return Observation(drawn.radio, jnp.full(4, 0.25), jnp.full(4, 2.0), jnp.zeros((4, 3)), bits)
  >>> def outcome(drawn, decision):
  ...     return delivered(wireless, drawn, jnp.full(4, 1e6), decision)[1]
  >>> control = fixed.make(FixedConfig(keep_ratio=0.5), context)
  >>> _, rounds = play(control, control.init(), drawn, observe, outcome)
  >>> rounds.decision.share_hz.shape, rounds.outcome.latency_s.shape
  ((3, 4), (3,))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedjax_lora.core import trees
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.learning import Work
from fedjax_lora.core.network import Controller, Decision, Delivery, Observation, Outcome, Radio, Wireless
from fedjax_lora.sim.cohort import choose


class ChannelDraws(NamedTuple):
    """Cohorts and their channels; leaves `[rounds, C, ...]`, or of one round `[C, ...]`.

    ids, present: who takes part, see `cohort.choose`.
    state: of the wireless network, the cohort's part. work: of its clients.
    radio: what control knows; its `band_hz` and `power_w` are `[rounds]`.
    """

    ids: Array
    present: Array
    state: Any
    work: Work
    radio: Radio


class Played(NamedTuple):
    """Rounds of control, a leading axis of rounds: what was decided, what it came to, and the controller's report."""

    decision: Decision
    outcome: Outcome
    report: dict[str, Array]


def draw_channel(
    wireless: Wireless,
    work: Work,
    state: Any,
    key: Array,
    downlink_bits: Array,
    *,
    rounds: int,
    cohort_size: int,
    size: int | None = None,
) -> ChannelDraws:
    """Rounds of a network from a state: clients stay where they are, cohorts and fading are drawn by the key.

    With the key of a run it draws the run's own rounds, from round 1 on.

    Args:
      wireless: the network.
      work: of all clients, `[K]`.
      state: of the network, `[K, ...]`.
      key: of the draws.
      downlink_bits: scalar, of each broadcast.
      rounds: how many.
      cohort_size: clients of a round.
      size: of the padded cohort, C; None is `cohort_size`.
    """
    num_clients, size = work.samples.shape[0], size or cohort_size
    all_ids, everyone = jnp.arange(num_clients, dtype=jnp.int32), cohort_size == num_clients

    def step(state: Any, number: Array) -> tuple[Any, ChannelDraws]:
        keys = round_keys(key, number)
        state = wireless.step(state, keys.channel, all_ids)
        priority = None if everyone else jax.vmap(jax.random.uniform)(client_keys(keys.cohort, all_ids))
        ids, present = choose(priority, num_clients, cohort_size, size)
        cohort, own_work = trees.take((state, work), ids)
        radio = wireless.observe(cohort, own_work, jnp.broadcast_to(downlink_bits, ids.shape), present)
        return state, ChannelDraws(ids, present, cohort, own_work, radio)

    return lax.scan(step, state, jnp.arange(rounds))[1]


def planned(drawn: Any, decision: Decision) -> Outcome:
    """The outcome that the controller planned: its latency, and no energy."""
    del drawn
    return Outcome(jnp.asarray(decision.latency_s), jnp.zeros(()))


def delivered(wireless: Wireless, drawn: ChannelDraws, bits: Array, decision: Decision) -> tuple[Delivery, Outcome]:
    """How the uploads of one round go, of `bits` `[C]` from each client, and what the round comes to.

    The round ends with the last upload of who can be heard at all.
    """
    delivery = wireless.deliver(drawn.state, drawn.work, bits, decision.share_hz, drawn.radio.start_s, drawn.present)
    heard = drawn.present & jnp.isfinite(delivery.latency_s)
    latency_s = jnp.max(jnp.where(heard, delivery.latency_s, 0.0), initial=0.0)
    energy_j = jnp.sum(delivery.energy_j) / jnp.maximum(jnp.sum(drawn.present), 1)
    return delivery, Outcome(latency_s, energy_j)


def _everything(drawn: Any, played: Played) -> Played:
    del drawn
    return played


def play(
    controller: Controller,
    state: Any,
    rounds: Any,
    observe: Callable[[Any], Observation],
    outcome: Callable[[Any, Decision], Outcome] = planned,
    keep: Callable[[Any, Played], Any] = _everything,
) -> tuple[Any, Any]:
    """A controller round by round without training.

    Args:
      controller: what is played.
      state: of the controller before the first of the rounds.
      rounds: tree of arrays with a leading axis of rounds, such as `ChannelDraws`.
      observe: one round of them -> what the controller sees of it.
      outcome: `(one round, decision) -> Outcome`; `planned` by default.
      keep: `(one round, Played) -> tree of arrays`, what is kept of each round; all of `Played` by default.

    Returns:
      The controller's state in the end, and what is kept, with a leading axis of rounds.
    """

    def step(state: Any, drawn: Any) -> tuple[Any, Any]:
        decision = controller.allocate(state, observe(drawn))
        decision = jax.tree.map(jnp.asarray, decision)
        came_to = outcome(drawn, decision)
        state, report = controller.update(state, came_to)
        return state, keep(drawn, Played(decision, came_to, report))

    return lax.scan(step, state, rounds)
