"""Trials: runs of one structure side by side in one program, which differ in numbers, seeds and partitions.

Each trial has a lane, a place on a leading axis of the state and of the metrics. The frozen base and the pools of
examples have no such axis: there is one of each, however many lanes.
"""

import bisect
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_lora.core import memory as machine
from fedjax_lora.core import trees
from fedjax_lora.core.memory import total
from fedjax_lora.core.numbers import Numbers
from fedjax_lora.core.types import Dataset, FedState, Metrics
from fedjax_lora.sim.chunk import chunk_size
from fedjax_lora.sim.cohort import TRIALS, device_mesh
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.memory import Needs, run_terms
from fedjax_lora.sim.parts import Layout, World
from fedjax_lora.sim.placement import state_shardings, world_shardings
from fedjax_lora.sim.scores import Scores, with_scores

MEMORY_SHARE = 0.35
"""Share of the memory at hand that trials at once may fill by what is foreseen, which is a low estimate: a trial took
1.8 times as much (benchmarks/results/sweep_memory.json)."""

_SHARED: Any = None
_STACKED: Any = 0
_WORLD_AXES = World(base=_SHARED, data=Dataset(train=_SHARED, index=_STACKED, count=_STACKED, test=_SHARED))


class Trial(NamedTuple):
    """What tells a run from the others of its structure.

    numbers: traced ones of its configuration. seed: of its key.
    rows, examples: its partition: `index` and `count` of `Dataset`; n_max is the same for all.
    """

    numbers: Numbers
    seed: int
    rows: Any
    examples: Array


class Lanes:
    """A simulation's program for so many trials at once.

    Attributes:
      number: of lanes. layout: of the work, in which devices share trials before they share clients.
      compile_s: seconds that tracing and compiling took; 0 before the first use.
    """

    def __init__(self, simulation: Simulation, number: int):
        self.number = number
        self.layout = lanes_layout(simulation.needs, simulation.layout, number)
        program = simulation.program.laid_out(self.layout)
        self.world = jax.device_put(simulation.world, world_shardings(simulation.world, self.layout))
        self._eval_every = simulation.eval_every
        each = NamedSharding(self.layout.mesh, P(TRIALS))
        self._each = each
        self._start = jax.vmap(program.start)
        self._segment = jax.vmap(program.segment, in_axes=(_WORLD_AXES, 0, None), spmd_axis_name=TRIALS)
        self.compile_s = 0.0
        self._init: Any = None
        self._compiled: Any = None

    def init(self, trials: Sequence[Trial]) -> FedState:
        """The states of the trials before round 1: leaves `[lanes, ...]`."""
        keys = jnp.stack([jax.random.key(trial.seed) for trial in trials])
        given = keys, trees.stack([trial.numbers for trial in trials])
        if self._init is None:
            shardings = self._shardings(jax.eval_shape(self._start, *given))
            self._init = jax.jit(self._start, out_shardings=shardings)
        return self._init(*given)

    def _shardings(self, states: FedState) -> FedState:
        return state_shardings(states, self.layout, lanes=True)

    def evaluate(self, trials: Sequence[Trial], states: FedState) -> list[float]:
        """The accuracy of each trial's state, NaN where it is not measured; `states` stay valid."""
        scores = self._run(self.stacked(trials), jax.tree.map(jnp.copy, states), 0)[2]
        return [float(accuracy) for accuracy in np.asarray(scores.accuracy)]

    def lower(self, world: World, states: FedState) -> Any:
        """The program of a segment, traced and lowered; `.compile()` is what `segments` runs."""
        places = self._shardings(states), self._each, self._each
        return jax.jit(self._segment, donate_argnums=1, out_shardings=places).lower(world, states, jnp.int32(0))

    def stacked(self, trials: Sequence[Trial]) -> World:
        """The world of the trials: their partitions stacked, all else as it is."""
        stacked = trees.stack([(trial.rows, trial.examples) for trial in trials])
        index, count = jax.device_put(stacked, self._each)
        return World(base=self.world.base, data=dataclasses.replace(self.world.data, index=index, count=count))

    def segments(
        self, trials: Sequence[Trial], states: FedState, rounds: int
    ) -> Iterator[tuple[FedState, list[Metrics]]]:
        """Advance all trials by `rounds`, yielding at every multiple of `eval_every` and at the end.

        Args:
          trials: as many as there are lanes.
          states: of them, all after the same number of rounds; consumed.
          rounds: at least 1.

        Yields:
          The states after the segment, which the next step consumes, and the metrics of each trial, on the host.
        """
        world = self.stacked(trials)
        done = int(states.round[0])
        last = done + rounds
        while done < last:
            number = min(self._eval_every - done % self._eval_every, last - done)
            states, rows, scores = self._run(world, states, number)
            done += number
            rows, scores = jax.device_get((rows, scores))
            yield states, _of_each(rows, scores, number)

    def _run(self, world: World, states: FedState, rounds: int) -> tuple[FedState, Metrics, Scores]:
        states = jax.device_put(states, self._shardings(states))
        if self._compiled is None:
            started = time.perf_counter()
            self._compiled = self.lower(world, states).compile()
            self.compile_s = time.perf_counter() - started
        return self._compiled(world, states, jnp.int32(rounds))


def lanes_layout(needs: Needs, layout: Layout, lanes: int) -> Layout:
    """The layout of so many trials at once: a chunk holds fewer clients of each, the more trials there are."""
    layout = layout._replace(mesh=device_mesh(lanes, model=layout.model_devices))
    per_device = lanes // layout.mesh.shape[TRIALS]
    chunk = chunk_size(needs.engine, layout, needs.activation_bytes, per_device)
    if needs.engine.client_chunk == "auto":
        while chunk > 1 and total(run_terms(needs, layout._replace(chunk=chunk), per_device)) > _most_bytes():
            chunk //= 2
    return layout._replace(chunk=chunk)


def _most_bytes() -> float:
    """What trials at once may fill of one device, by what is foreseen."""
    sharing = jax.device_count() if jax.devices()[0].platform == "cpu" else 1
    return MEMORY_SHARE * machine.available_bytes() / sharing


def lanes_bytes(needs: Needs, layout: Layout, lanes: int) -> float:
    """Bytes that one device holds of so many trials at once, as `sim.memory` foresees them."""
    layout = lanes_layout(needs, layout, lanes)
    return total(run_terms(needs, layout, lanes // layout.mesh.shape[TRIALS]))


def trials_at_once(simulation: Simulation, trials: int) -> int:
    """How many of so many trials run side by side: what is asked for, or as many as memory holds; at least 1.

    Batches are of one size where that wastes no lane (10 trials where 8 would fit are two batches of 5), and of as
    many lanes for each device.

    Raises:
      ValueError: all of the memory does not hold what is asked for, by what is foreseen.
    """
    needs, layout = simulation.needs, simulation.layout
    devices = jax.device_count() // layout.model_devices
    each = devices if trials >= devices else 1
    if needs.engine.trials_at_once != "auto":
        most = min(trials, needs.engine.trials_at_once)
        each = math.gcd(each, most)
        _check_memory(needs, layout, most)
    else:
        sizes = range(each, trials + each, each)
        fitting = bisect.bisect_right(sizes, _most_bytes(), key=lambda lanes: lanes_bytes(needs, layout, lanes))
        most = sizes[max(fitting, 1) - 1]
    return each * math.ceil(math.ceil(trials / math.ceil(trials / most)) / each)


def _check_memory(needs: Needs, layout: Layout, lanes: int) -> None:
    needed, held = lanes_bytes(needs, layout, lanes), _most_bytes() / MEMORY_SHARE
    if needed > held:
        raise ValueError(
            f"engine.trials_at_once must be less, or auto, where a device holds {held / 1e9:,.2f} GB: {lanes} trials "
            f"take about {needed / 1e9:,.2f} GB, got {needs.engine.trials_at_once}"
        )


def unstacked(states: FedState) -> list[FedState]:
    """The states of all lanes, on the host but for their keys."""
    words = jax.device_get(jax.random.key_data(states.key))
    rest = jax.device_get(dataclasses.replace(states, key=words))
    found = [lane_of(rest, lane) for lane in range(len(words))]
    return [dataclasses.replace(state, key=jax.random.wrap_key_data(state.key)) for state in found]


def _of_each(rows: Metrics, scores: Scores, number: int) -> list[Metrics]:
    """The metrics of each lane."""
    lanes = range(len(np.asarray(scores.loss)))
    return [with_scores(lane_of(rows, lane), lane_of(scores, lane), number) for lane in lanes]


def lane_of(tree: Any, lane: int) -> Any:
    """One lane of a tree of arrays."""
    return jax.tree.map(lambda leaf: leaf[lane], tree)
