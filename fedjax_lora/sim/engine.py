"""The engine: rounds as one compiled, donated program, run a segment at a time between evaluations."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedjax_lora.core.methods import Link
from fedjax_lora.core.types import Adapters, Base, ClientState, FedState, Hyper, Metrics
from fedjax_lora.sim.cohort import replicated
from fedjax_lora.sim.evaluate import Evaluate, EvaluatePersonal
from fedjax_lora.sim.full_gradient import FullGradient
from fedjax_lora.sim.parts import Parts, World
from fedjax_lora.sim.round import RoundFn, make_round
from fedjax_lora.training.personal import deployed, extract


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the simulation is executed; none of it changes a result but by the order in which float32 numbers are added.

    client_chunk: clients trained at once on each device; `auto` fits their activations to the device.
    eval_every: rounds between evaluations (and checkpoints).
    eval_batch_size: examples of one evaluation step.
    """

    client_chunk: int | Literal["auto"] = "auto"
    eval_every: int = 5
    eval_batch_size: int = 64

    def __post_init__(self):
        if self.client_chunk != "auto" and self.client_chunk < 1:
            raise ValueError(f"client_chunk must be 'auto' or at least 1, got {self.client_chunk}")
        if self.eval_every < 1:
            raise ValueError(f"eval_every must be at least 1, got {self.eval_every}")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """What a state starts from, beside the key.

    adapters: `key -> Adapters`. memory: `adapters -> memory` of one client's sparsifier.
    server: `adapters -> state` of the server optimizer. merged: `adapters -> FedState.merged`.
    ranks: `[K]`, the clients' structural ranks.
    """

    adapters: Callable[[Array], Adapters]
    memory: Callable[[Adapters], Any]
    server: Callable[[Adapters], Any]
    merged: Callable[[Adapters], dict[str, Array]]
    ranks: Array
    link: Link
    hyper: Hyper


def first_state(parts: Parts, initial: Initial, num_clients: int, key: Array) -> FedState:
    """The state before round 1."""
    run_key, adapter_key, link_key = jax.random.split(key, 3)
    adapters = initial.adapters(adapter_key)
    one = ClientState(
        rank=jnp.float32(0),
        kept=extract(adapters, parts.aggregator.keeps),
        memory=initial.memory(adapters),
        drift=parts.drift.init_client(adapters),
        own=adapters.modules if parts.aggregator.resumes else {},
    )
    clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), one)
    return FedState(
        key=run_key,
        round=jnp.int32(0),
        adapters=adapters,
        server=initial.server(adapters),
        link=initial.link.init(link_key, jnp.arange(num_clients)),
        queue_s=jnp.float32(parts.controller.queue_s),
        energy_queue_j=jnp.float32(0),
        elapsed_s=jnp.float32(0),
        merged=initial.merged(adapters),
        drift=parts.drift.init_server(adapters),
        clients=dataclasses.replace(clients, rank=initial.ranks),
        hyper=initial.hyper,
    )


BaseOf = Callable[[World, FedState], Base]


class Scores(NamedTuple):
    """An evaluation: as `eval_loss`, `eval_accuracy` and `personal_accuracy` of `Metrics`."""

    loss: Array
    accuracy: Array
    personal: Array


def make_segment(
    round_fn: RoundFn, evaluate: Evaluate, evaluate_personal: EvaluatePersonal, base_of: BaseOf, max_rounds: int
):
    """`(world, state, rounds) -> (state, metrics [max_rounds], Scores)`: rounds, then one evaluation.

    The number of rounds is traced: one executable serves a whole segment, a shorter last one, and 0 rounds,
    which only evaluates. Rows of the metrics from `rounds` on are to be ignored.
    """

    step = jax.jit(round_fn, inline=True)  # traced once, for the shapes of its metrics and for the loop

    def segment(world: World, state: FedState, rounds: Array):
        shapes = jax.eval_shape(step, world, state)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((max_rounds, *x.shape), x.dtype), shapes)

        def body(number: Array, carry):
            state, rows = carry
            state, row = step(world, state)
            return state, jax.tree.map(lambda all_rows, x: all_rows.at[number].set(x), rows, row)

        state, rows = lax.fori_loop(0, rounds, body, (state, rows))
        base = base_of(world, state)
        loss, accuracy = evaluate(base, world.data.test, deployed(state.adapters, state.clients), state.hyper)
        personal = evaluate_personal(base, world.data, state.adapters, state.clients, state.hyper)
        return state, rows, Scores(loss, accuracy, personal)

    return segment


class Simulation:
    """A built experiment. `init` makes a state, `run` advances it; both are deterministic in the key.

    Attributes:
      world: frozen base and data, on the device.
      parts: the functions that a round is made of.
      base_hash: of the frozen weights, and of the task head where it is not drawn.
      examples_hash: of the examples, those for pre-training and testing included.
      partition_hash: of who holds which examples.
      tokenizer_hash, model_config_hash: of the pretrained model's tokenizer and `config.json`; empty without one.
      class_names: name of each label, in the order of the head's columns.
      truncated: sentences that were cut to the maximum length.
      full_gradient: loss and gradient by the weights themselves, for what measures rather than trains.
      score: loss and accuracy on a pool.
      compile_s: seconds that tracing and compiling took; 0 until the first run.
    """

    def __init__(
        self,
        parts: Parts,
        world: World,
        initial: Initial,
        evaluate: Evaluate,
        evaluate_personal: EvaluatePersonal,
        eval_every: int,
        base_hash: str,
        examples_hash: str,
        partition_hash: str,
        tokenizer_hash: str,
        model_config_hash: str,
        class_names: tuple[str, ...],
        truncated: int,
        full_gradient: FullGradient,
    ):
        self.parts = parts
        self.eval_every = eval_every
        self.base_hash = base_hash
        self.examples_hash = examples_hash
        self.partition_hash = partition_hash
        self.tokenizer_hash = tokenizer_hash
        self.model_config_hash = model_config_hash
        self.class_names = class_names
        self.truncated = truncated
        self.full_gradient = full_gradient
        self.score = evaluate
        self.compile_s = 0.0
        self._initial = initial
        self._everywhere = replicated(parts.mesh)
        self.world = jax.device_put(world, self._everywhere)
        segment = make_segment(make_round(parts), evaluate, evaluate_personal, parts.current_base, eval_every)
        self._program = jax.jit(segment, donate_argnums=1, out_shardings=self._everywhere)
        self._compiled = None

    def init(self, key: Array) -> FedState:
        """The state before round 1: fresh adapters, a cell drawn anew, the controller's first queue."""
        make = functools.partial(first_state, self.parts, self._initial, self.world.data.count.shape[0])
        return jax.jit(make, out_shardings=self._everywhere)(key)

    def compile(self, state: FedState) -> None:
        """Compile the program ahead of time, once; `compile_s` says how long it took."""
        if self._compiled is None:
            started = time.perf_counter()
            self._compiled = self._program.lower(self.world, state, jnp.int32(0)).compile()
            self.compile_s = time.perf_counter() - started

    def segments(self, state: FedState, rounds: int) -> Iterator[tuple[FedState, Metrics]]:
        """Advance by `rounds`, yielding at every multiple of `eval_every` and at the end.

        Each item is the state after the segment and its metrics on the host, `[n]` each, the last of them
        with the evaluation. The given state is copied: it stays valid. A yielded state is consumed by the
        next step.
        """
        state = jax.tree.map(jnp.copy, jax.device_put(state, self._everywhere))
        self.compile(state)
        done, last = int(state.round), int(state.round) + rounds
        while done < last:
            number = min(self.eval_every - done % self.eval_every, last - done)
            state, metrics = self._run_segment(state, number)
            done += number
            yield state, metrics

    def run(self, state: FedState, rounds: int, progress: bool = False) -> tuple[FedState, Metrics]:
        """Advance by `rounds` >= 1; the metrics are stacked to `[rounds]`, on the host.

        `progress` shows how far it is: a bar in a terminal, elsewhere lines, at least one every 30 s.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        segments = list(self._shown(state, rounds) if progress else self.segments(state, rounds))
        metrics = jax.tree.map(lambda *parts: np.concatenate(parts), *(row for _, row in segments))
        return segments[-1][0], metrics

    def evaluate(self, state: FedState) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy on the held-out pool, `eval_loss` and `eval_accuracy` of Metrics."""
        state = jax.tree.map(jnp.copy, jax.device_put(state, self._everywhere))
        self.compile(state)
        scores = self._call(state, 0)[2]
        return float(scores.loss), float(scores.accuracy)

    def _shown(self, state: FedState, rounds: int) -> Iterator[tuple[FedState, Metrics]]:
        """`segments`, with their progress on stdout."""
        from rich.console import Console  # only where it is asked for

        from fedjax_lora.core.progress import Progress

        done = int(state.round)
        with Progress(Console(highlight=False)) as shown:
            shown.stage("compiling a round")
            self.compile(jax.device_put(state, self._everywhere))
            yield from shown.rounds(self.segments(state, rounds), done, done + rounds)

    def _run_segment(self, state: FedState, number: int) -> tuple[FedState, Metrics]:
        state, rows, scores = self._call(state, number)
        metrics = jax.tree.map(lambda x: np.array(x[:number]), jax.device_get(rows))
        metrics.eval_loss[-1], metrics.eval_accuracy[-1] = scores.loss, scores.accuracy
        metrics.personal_accuracy[-1] = scores.personal
        return state, metrics

    def _call(self, state: FedState, number: int):
        assert self._compiled is not None
        return self._compiled(self.world, state, jnp.int32(number))
