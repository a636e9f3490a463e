"""The engine: rounds as one compiled, donated program, run a segment at a time between evaluations."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Sharding
from jax.typing import ArrayLike

from fedjax_lora.core import hosts
from fedjax_lora.core.learning import Logits
from fedjax_lora.core.numbers import Numbers
from fedjax_lora.core.types import ClientState, FedState, Metrics
from fedjax_lora.sim.chunk import chunk_size
from fedjax_lora.sim.cohort import device_mesh, replicated
from fedjax_lora.sim.evaluate import used_adapters
from fedjax_lora.sim.feed import Feed
from fedjax_lora.sim.full_gradient import FullGradient
from fedjax_lora.sim.memory import Needs
from fedjax_lora.sim.merged import current_base, nothing_merged
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sim.parts import Layout, MakeParts, World
from fedjax_lora.sim.placement import state_shardings, world_shardings
from fedjax_lora.sim.round import make_round
from fedjax_lora.sim.running import first_running
from fedjax_lora.sim.scores import Scores, score, with_scores
from fedjax_lora.training.personal import deployed, extract


def first_state(make_parts: MakeParts, num_clients: int, key: Array, numbers: Numbers) -> FedState:
    """The state before round 1 of a run with these numbers: fresh adapters, channels, and the methods' first states."""
    parts = make_parts(numbers)
    run_key, adapter_key, wireless_key = jax.random.split(key, 3)
    adapters = parts.init_adapters(adapter_key)
    one = ClientState(
        rank=jnp.float32(0),
        personal=extract(adapters, parts.aggregator.personal),
        methods={
            "sparsifier": parts.sparsifier.init(parts.on_air(adapters)),
            "drift": parts.correction.init_client(adapters),
            "aggregation": adapters.modules if parts.aggregator.resumes else (),
        },
    )
    clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), one)
    state = FedState(
        key=run_key,
        round=jnp.int32(0),
        numbers=dict(numbers),
        adapters=adapters,
        merged=nothing_merged(adapters) if parts.aggregator.merges else {},
        elapsed_s=jnp.float32(0),
        methods={
            "wireless": parts.wireless.init(wireless_key, jnp.arange(num_clients)),
            "control": parts.controller.init(),
            "training": parts.trainer.init(),
            "server": parts.server.init(adapters),
            "drift": parts.correction.init_server(adapters),
        },
        clients=dataclasses.replace(clients, rank=parts.ranks),
    )
    return dataclasses.replace(state, methods={**state.methods, "arrival": first_running(parts, state)})


class Facts(NamedTuple):
    """What a run is of, for its log and for a second start.

    base_hash: of the frozen weights, and of the task head where it is not drawn.
    initial_hash: of the adapters that it starts from, with their head; empty where all are drawn.
    examples_hash: of the examples, those for pre-training and testing included.
    partition_hash: of who holds which examples.
    tokenizer_hash, model_config_hash: of the pretrained model's tokenizer and `config.json`; empty without one.
    class_names: name of each label, in the order of the head's columns.
    truncated: texts that were cut to the maximum length.
    notes: what a user should know of how the data were read.
    holders: `[N]`, who holds each training example, where the data say so. labels: `[N]`, by which others are dealt.
    columns: role -> column of the tables that were read; empty where these name no columns.
    """

    base_hash: str
    examples_hash: str
    partition_hash: str
    tokenizer_hash: str
    model_config_hash: str
    class_names: tuple[str, ...]
    truncated: int
    initial_hash: str = ""
    notes: tuple[str, ...] = ()
    holders: np.ndarray | None = None
    labels: np.ndarray | None = None
    columns: Mapping[str, str] = {}


def segment_lengths(done: int, rounds: int, eval_every: int) -> list[int]:
    """Of the `rounds` after `done`, the number in each segment: one ends at each multiple of `eval_every`."""
    last = done + rounds
    ends = [*range(done - done % eval_every + eval_every, last, eval_every), *([last] if rounds > 0 else [])]
    return [end - start for start, end in zip([done, *ends], ends, strict=False)]


def make_segment(make_parts: MakeParts, eval_batch_size: int, max_rounds: int):
    """`(world, state, rounds) -> (state, metrics [max_rounds], Scores)`: rounds, then one evaluation.

    The number of rounds is traced: one executable serves a whole segment, a shorter last one, and 0 rounds,
    which only evaluates. Rows of the metrics from `rounds` on are to be ignored.
    """

    step = jax.jit(make_round(make_parts), inline=True)  # traced once, for the shapes of its metrics and for the loop

    def segment(world: World, state: FedState, rounds: Array):
        shapes = jax.eval_shape(step, world, state)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((max_rounds, *x.shape), x.dtype), shapes)

        def body(number: Array, carry):
            state, rows = carry
            state, row = step(world, state)
            return state, jax.tree.map(lambda all_rows, x: all_rows.at[number].set(x), rows, row)

        state, rows = lax.fori_loop(0, rounds, body, (state, rows))
        return state, rows, score(make_parts(state.numbers), world, state, eval_batch_size)

    return segment


class Program:
    """What runs simulations of one structure, whatever their numbers, seeds and data: traced and compiled once a shape.

    Attributes:
      parts_of: from a layout to what makes a round's records of numbers; `make_parts` is it in this program's layout.
      layout: how the work of a round is laid out. everywhere: the sharding of what each device holds whole.
      engine: with no more rounds between evaluations than a run has.
      start: `(key, numbers) -> state` before round 1, not compiled. segment: of `make_segment`, not compiled.
    """

    def __init__(self, parts_of: Callable[[Layout], MakeParts], layout: Layout, engine: EngineConfig, num_clients: int):
        self.parts_of = parts_of
        self.layout = layout
        self.engine = engine
        self.num_clients = num_clients
        self.make_parts = make_parts = parts_of(layout)
        self.everywhere = replicated(layout.mesh)
        self.start = functools.partial(first_state, make_parts, num_clients)
        self.segment = make_segment(make_parts, engine.eval_batch_size, engine.eval_every)
        self.predict = jax.jit(functools.partial(predict, make_parts))
        self._init: Any = None
        self._compiled: dict[str, Any] = {}

    def init(self, key: Array, numbers: Numbers) -> FedState:
        """`start`, compiled."""
        if self._init is None:
            like = jax.eval_shape(self.start, key, numbers)
            self._init = jax.jit(self.start, out_shardings=state_shardings(like, self.layout))
        return self._init(key, numbers)

    def place(self, state: FedState) -> FedState:
        """The state on the devices of the layout."""
        return jax.device_put(state, state_shardings(state, self.layout))

    def laid_out(self, layout: Layout) -> "Program":
        """The same program in another layout."""
        return Program(self.parts_of, layout, self.engine, self.num_clients)

    def compiled(self, world: World, state: FedState) -> Any:
        """`(world, state, rounds) -> (state, metrics, Scores)` for arguments of these shapes, ahead of time."""
        shapes = str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (world, state)))
        if shapes not in self._compiled:
            self._compiled[shapes] = self.lower(world, state).compile()
        return self._compiled[shapes]

    def lower(self, world: World, state: FedState) -> jax.stages.Lowered:
        """The program of a segment for these shapes on the devices of its layout, at hand or not."""
        shardings = state_shardings(state, self.layout)
        segment = jax.jit(self.segment, donate_argnums=1, out_shardings=(shardings, self.everywhere, self.everywhere))
        rounds = jax.ShapeDtypeStruct((), jnp.int32)
        world = jax.tree.map(_placed, world, world_shardings(world, self.layout))
        return segment.lower(world, jax.tree.map(_placed, state, shardings), _placed(rounds, self.everywhere))


def _placed(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def predict(make_parts: MakeParts, world: World, state: FedState, inputs: Mapping[str, Array]) -> Array:
    """`[B, ...]` outputs of the task, by the adapters that a newcomer would be given."""
    parts = make_parts(state.numbers)
    used = used_adapters(parts.adapter, deployed(state.adapters, state.clients), parts.rank, parts.scale)
    outputs = parts.model.apply(current_base(parts, world, state), used, inputs)
    return outputs() if isinstance(outputs, Logits) else outputs


class Simulation:
    """A built experiment. `init` makes a state, `run` advances it; both are deterministic in the key.

    Example:
      >>> import fedjax_lora as fl, jax
      >>> simulation = fl.build(fl.load_config(None, ["rounds=2", "pretrain.steps=2", "clients.count=3"]))
      >>> state, metrics = simulation.run(simulation.init(jax.random.key(0)), rounds=2)
      >>> metrics.latency_s.shape
      (2,)

    Attributes:
      program: what runs it; shared by simulations that differ in numbers, seed and data alone.
      numbers: the traced numbers of the configuration, see `core.numbers`.
      world: frozen base and data, on the device; of a training pool on the host what the last segment needed.
      eval_every: rounds between evaluations.
      facts: what the run is of, see `Facts`.
      full_gradient: loss and gradient by the weights themselves, for what measures rather than trains.
      needs: of memory, see `sim.memory`.
      feed: what brings the training pool from the host; None where it is on the device.
      compile_s: seconds that tracing and compiling took; 0 until the first run.
    """

    def __init__(
        self,
        program: Program,
        numbers: Numbers,
        world: World,
        eval_every: int,
        facts: Facts,
        full_gradient: FullGradient,
        needs: Needs,
        feed: Feed | None = None,
    ):
        self.program = program
        self.numbers = numbers
        self.eval_every = eval_every
        self.facts = facts
        self.full_gradient = full_gradient
        self.needs = needs
        self.feed = feed
        self.compile_s = 0.0
        self.world = jax.tree.map(hosts.place, world, world_shardings(world, program.layout))
        self._compiled = None

    @property
    def make_parts(self) -> MakeParts:
        """From numbers to the records that a round is made of."""
        return self.program.make_parts

    @property
    def layout(self) -> Layout:
        """How the work of a round is laid out."""
        return self.program.layout

    def init(self, key: Array) -> FedState:
        """The state before round 1: fresh adapters, a cell drawn anew, the controller's first queue."""
        return self.program.init(key, self.numbers)

    def predict(self, state: FedState, inputs: Mapping[str, ArrayLike]) -> Array:
        """`[B, ...]` outputs of the task, such as logits, by the adapters that a newcomer would be given.

        Args:
          state: of this simulation.
          inputs: a batch as the model takes it, such as `input_ids` and `attention_mask`, or `image`.
        """
        return self.program.predict(self.world, state, {name: jnp.asarray(leaf) for name, leaf in inputs.items()})

    def compile(self, state: FedState) -> None:
        """Compile the program ahead of time, once; `compile_s` says how long it took."""
        if self._compiled is None:
            started = time.perf_counter()
            self._compiled = self.program.compiled(self.world, state)
            self.compile_s = time.perf_counter() - started

    def lower(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """The program of a segment for other `jax.Device`s, from shapes alone; `.compile()` compiles it.

        As many clients are trained at once as `engine.client_chunk` says, of which `auto` knows no memory.

        Example:
          >>> from jax.experimental.topologies import get_topology_desc
          >>> target = get_topology_desc("v5e:2x2", platform="tpu")  # doctest: +SKIP
          >>> simulation.lower(target.devices).compile().memory_analysis()  # doctest: +SKIP
        """
        layout = self.layout._replace(mesh=device_mesh(devices=devices, model=self.layout.model_devices))
        layout = layout._replace(chunk=chunk_size(self.needs.engine, layout, self.needs.activation_bytes))
        return self.program.laid_out(layout).lower(self.world, self.needs.state)

    def segments(self, state: FedState, rounds: int) -> Iterator[tuple[FedState, Metrics]]:
        """Advance by `rounds`, yielding at every multiple of `eval_every` and at the end.

        Each item is the state after the segment and its metrics on the host, `[n]` each, the last of them
        with the evaluation. The given state is copied: it stays valid. A yielded state is consumed by the
        next step.
        """
        state = jax.tree.map(jnp.copy, self.program.place(state))
        self.compile(state)
        done = int(state.round)
        numbers = segment_lengths(done, rounds, self.eval_every)
        worlds = None
        if self.feed is not None:
            worlds = self.feed.worlds(self.world, self.layout, state.key, done, numbers, self.program.everywhere)
        for number in numbers:
            self.world = self.world if worlds is None else next(worlds)
            state, metrics = self._run_segment(state, number)
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
        """The task's loss and accuracy on the held-out pool, `eval_loss` and `eval_accuracy` of Metrics."""
        scores = self.scores(state)
        return float(scores.loss), float(scores.accuracy)

    def scores(self, state: FedState) -> Scores:
        """All that is found on the held-out pool."""
        state = jax.tree.map(jnp.copy, self.program.place(state))
        self.compile(state)
        return self._call(state, 0)[2]

    @property
    def judged_by(self) -> str:
        """What the task is judged by, see `Task`."""
        return self.make_parts(self.numbers).task.judged_by

    def _shown(self, state: FedState, rounds: int) -> Iterator[tuple[FedState, Metrics]]:
        """`segments`, with their progress on stdout."""
        from rich.console import Console  # only where it is asked for

        from fedjax_lora.core.progress import Progress

        done = int(state.round)
        with Progress(Console(highlight=False)) as shown:
            shown.stage("compiling a round")
            self.compile(self.program.place(state))
            yield from shown.rounds(self.segments(state, rounds), done, done + rounds, self.judged_by)

    def _run_segment(self, state: FedState, number: int) -> tuple[FedState, Metrics]:
        state, rows, scores = self._call(state, number)
        rows, scores = jax.device_get((rows, scores))
        return state, with_scores(rows, scores, number)

    def _call(self, state: FedState, number: int):
        assert self._compiled is not None
        return self._compiled(self.world, state, np.int32(number))
