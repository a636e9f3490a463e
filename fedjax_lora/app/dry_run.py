"""What a run would take, without running it: memory, arithmetic and time of a round, and what fits side by side."""

import bisect
import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from fedjax_lora.app.runner import device_name, peak_memory_bytes
from fedjax_lora.app.targets import Chip, Target
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core import memory, trees
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.methods import Method
from fedjax_lora.sim.chunk import ACCELERATOR_SHARE, choose_chunk
from fedjax_lora.sim.cohort import CLIENTS, MODEL, TRIALS, device_mesh, mesh_shape
from fedjax_lora.sim.engine import Simulation
from fedjax_lora.sim.memory import run_terms
from fedjax_lora.sim.parts import Layout
from fedjax_lora.sim.placement import base_bytes
from fedjax_lora.sim.round import make_round
from fedjax_lora.sim.trials import MEMORY_SHARE
from fedjax_lora.sim.work import Work, work_of

MOST_TRIALS = 4096
"""Trials at once beyond which nobody is told a number."""


class Needed(NamedTuple):
    """Bytes that a run holds at its peak, of how many, and who says so; round_s: seconds of a round, None untold."""

    bytes: float
    available_bytes: float
    memory_from: str
    round_s: float | None
    time_from: str


class Foreseen(NamedTuple):
    """What is foreseen of a run.

    target: devices. fits: whether their memory holds it. needed_bytes, available_bytes: of one device or, where this
    machine's memory is shared by its devices, of the process. memory_from, time_from: who says so.
    kinds: what is held -> bytes on one device, by shapes alone.
    host_bytes: of the training pool, where that is on the host; else 0.
    flop, bytes: of the products of a round, on all devices. round_s: seconds of a round.
    cohort, chunk: as the run has them; cohort_key: of the configuration, that the former is of.
    trials: that fit side by side on all devices.
    fitting: the largest cohort and chunk that fit, where these do not; None where none do, or these do.
    model_devices: the fewest devices that hold the frozen base together, where as many as are asked for do not; None
      where these do, or all do not.
    """

    target: str
    fits: bool
    needed_bytes: float
    available_bytes: float
    memory_from: str
    kinds: dict[str, float]
    host_bytes: float
    flop: float
    bytes: float
    round_s: float | None
    time_from: str
    cohort: int
    cohort_key: str
    chunk: int
    trials: int
    fitting: dict[str, int] | None
    model_devices: int | None = None

    def document(self) -> dict[str, Any]:
        """As JSON can hold it."""
        known = self._asdict()
        return known | {"available_bytes": None if math.isinf(self.available_bytes) else self.available_bytes}

    def lines(self) -> list[str]:
        """For a terminal."""
        fits = "fits" if self.fits else "does not fit"
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1])
        seconds = "unknown" if self.round_s is None else f"{self.round_s:.3g} s"
        found = [
            f"{self.target}: {fits}, {_bytes(self.needed_bytes)} of {_bytes(self.available_bytes)}, {self.memory_from}",
            "on each device: " + ", ".join(f"{kind} {_bytes(size)}" for kind, size in kinds),
            *([f"on the host: training pool {_bytes(self.host_bytes)}"] if self.host_bytes else []),
            f"a round: {self.flop:.3g} FLOP and {_bytes(self.bytes)} in its products; {seconds}, {self.time_from}",
            f"{self.cohort} clients a round, {self.chunk} at once on each device; {self.trials} trials side by side",
        ]
        if not self.fits:
            fitting = "no cohort fits"
            if self.fitting:
                fitting = (
                    f"the largest that fits: {self.cohort_key}={self.fitting['cohort']}, "
                    f"engine.client_chunk={self.fitting['chunk']}"
                )
            found.append(fitting)
        if self.model_devices is not None:
            found.append(f"the frozen base alone does not fit: it does with engine.model_devices={self.model_devices}")
        return found


def dry_run(config: ExperimentConfig, target: Target | None, methods: Sequence[Method] = ()) -> Foreseen:
    """What a run of this configuration would take on a target, or on this machine; nothing is written.

    Raises:
      ConfigError: the configuration is refused, as `build` does.
    """
    here = 1 if target is not None else config.engine.model_devices  # a target's devices are not at hand
    engine = dataclasses.replace(config.engine, model_devices=here)
    simulation = build(dataclasses.replace(config, engine=engine), methods, draft=True)
    layout = _layout(simulation, target, config.engine.model_devices)
    terms = run_terms(simulation.needs, layout)
    work = round_work(simulation)
    if target is None:
        needed = _measured(simulation, config.seed)
    elif target.devices is None:
        needed = _by_table(target, memory.total(terms), work)
    else:
        needed = _compiled(simulation, layout, target, memory.total(terms), work)
    fits = needed.bytes <= needed.available_bytes
    kinds: dict[str, float] = {}
    for term in terms:
        kinds[term.kind] = kinds.get(term.kind, 0.0) + term.bytes
    sharing = layout.mesh.size if target is None and jax.devices()[0].platform == "cpu" else 1
    room = needed.available_bytes / sharing
    factor = max(needed.bytes / sharing / memory.total(terms), 1.0)
    return Foreseen(
        target=f"this machine, {device_name()}" if target is None else target.name,
        fits=fits,
        needed_bytes=needed.bytes,
        available_bytes=needed.available_bytes,
        memory_from=needed.memory_from,
        kinds=kinds,
        host_bytes=trees.num_bytes(simulation.feed.pool) if simulation.feed else 0.0,
        flop=work.flop,
        bytes=work.bytes,
        round_s=needed.round_s,
        time_from=needed.time_from,
        cohort=layout.cohort_size,
        cohort_key=layout.cohort_key,
        chunk=layout.chunk,
        trials=layout.num_devices * _trials(simulation, layout, room),
        fitting=None if fits else _fitting(simulation, layout, room / factor),
        model_devices=_model_devices(simulation, layout, room),
    )


def round_work(simulation: Simulation) -> Work:
    """Of one round on all devices, whose loops over clients have known lengths."""
    program = simulation.program.laid_out(simulation.layout._replace(in_order=False, mesh=device_mesh()))
    return work_of(make_round(program.make_parts), simulation.world, simulation.needs.state)


def _layout(simulation: Simulation, target: Target | None, model: int) -> Layout:
    """The layout on the target, with as many clients at once as its memory is said to hold.

    model: devices that hold one frozen base together.
    """
    layout, needs = simulation.layout, simulation.needs
    if target is None:
        return layout
    try:
        mesh: Any = _abstract(*mesh_shape(target.chips, model=model))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if target.devices is not None:
        mesh = device_mesh(devices=target.devices, model=model)
    layout = layout._replace(mesh=mesh)
    cohort = -(-layout.cohort_size // (1 if layout.in_order else layout.num_devices))
    if needs.engine.client_chunk != "auto":
        return layout._replace(chunk=min(needs.engine.client_chunk, cohort))
    budget = int(ACCELERATOR_SHARE * target.chip.memory_bytes)
    return layout._replace(chunk=choose_chunk(cohort, needs.activation_bytes, budget))


def _measured(simulation: Simulation, seed: int) -> Needed:
    """By the compiler of this machine, and a segment that is run here."""
    state = simulation.init(jax.random.key(seed))
    compiled = simulation.program.compiled(simulation.world, state)
    analysis, accelerator = compiled.memory_analysis(), jax.local_devices()[0].platform != "cpu"
    more = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    if accelerator:
        needed, said = more + analysis.argument_size_in_bytes, "by the compiler"
    else:
        held = _resident_bytes() + len(jax.local_devices()) * more
        needed, said = max(held, peak_memory_bytes()), "by the compiler, beside what this process holds"
    round_s = None
    if needed <= memory.available_bytes():
        simulation.scores(state)
        started = time.perf_counter()
        simulation.scores(state)
        evaluated = time.perf_counter()
        rounds = simulation.eval_every
        simulation.run(state, rounds)
        ended = time.perf_counter()
        round_s = max(ended - evaluated - (evaluated - started), 0.0) / rounds
    return Needed(needed, memory.available_bytes(), said, round_s, "measured here")


def _by_table(target: Target, held_bytes: float, work: Work) -> Needed:
    """By shapes and the maker's numbers: nothing is compiled."""
    source = f"by shapes alone, with the memory of {target.chip.source}"
    return Needed(held_bytes, target.chip.memory_bytes, source, _roof_s(target, work), _roof(target.chip))


def _compiled(simulation: Simulation, layout: Layout, target: Target, held_bytes: float, work: Work) -> Needed:
    """By the compiler of the target."""
    available = target.chip.memory_bytes
    try:
        compiled = simulation.program.laid_out(layout).lower(simulation.world, simulation.needs.state).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([0-9.]+)([KMG]) of", str(error))
        needed = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]] if used else held_bytes
        return Needed(max(needed, held_bytes), available, "by the compiler", _roof_s(target, work), _roof(target.chip))
    analysis: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    needed = held - analysis.alias_size_in_bytes
    seconds, flop = costs.get("optimal_seconds", -1.0), costs.get("flops", 0.0)
    if seconds <= 0 or flop <= 0:
        return Needed(needed, available, "by the compiler", _roof_s(target, work), _roof(target.chip))
    round_s = max(seconds / flop * work.flop / target.chips, _roof_s(target, work))
    return Needed(needed, available, "by the compiler", round_s, "by the compiler's seconds for each FLOP")


def _roof_s(target: Target, work: Work) -> float:
    """The least time: at the peak of arithmetic, or of memory."""
    return max(work.flop / target.chip.flop_per_s, work.bytes / target.chip.bytes_per_s) / target.chips


def _roof(chip: Chip) -> str:
    return f"at least, at the peaks of {chip.source}"


def _trials(simulation: Simulation, layout: Layout, room_bytes: float) -> int:
    """How many trials one device holds, each of which it has to itself; at least 1."""
    alone = layout._replace(mesh=_abstract(1, 1, layout.model_devices), chunk=1)
    numbers = range(1, MOST_TRIALS // layout.num_devices + 1)

    def held(number: int) -> float:
        return memory.total(run_terms(simulation.needs, alone, number))

    return max(bisect.bisect_right(numbers, MEMORY_SHARE * room_bytes, key=held), 1)


def _model_devices(simulation: Simulation, layout: Layout, room_bytes: float) -> int | None:
    """The fewest devices that hold the frozen base in so many bytes on each, where those asked for do not."""
    devices, base = layout.mesh.size, simulation.needs.world.base

    def held(number: int) -> int:
        return base_bytes(base, layout._replace(mesh=_abstract(*mesh_shape(devices, model=number))))

    if held(layout.model_devices) <= room_bytes:
        return None
    numbers = (number for number in range(1, devices + 1) if devices % number == 0)
    return next((number for number in numbers if held(number) <= room_bytes), None)


def _abstract(trials: int, clients: int, model: int) -> Any:
    """A mesh of so many devices, of which there are none."""
    return AbstractMesh((trials, clients, model), (TRIALS, CLIENTS, MODEL))


def _fitting(simulation: Simulation, layout: Layout, room_bytes: float) -> dict[str, int] | None:
    """The largest cohort, and then the largest chunk, that so many bytes hold by shapes alone."""

    def fits(cohort: int, chunk: int) -> bool:
        smaller = layout._replace(cohort_size=cohort, chunk=chunk)
        return memory.total(run_terms(simulation.needs, smaller)) <= room_bytes

    cohorts = [cohort for cohort in _halved(layout.cohort_size) if fits(cohort, 1)]
    if not cohorts:
        return None
    chunks = [chunk for chunk in _halved(min(layout.chunk, cohorts[0])) if fits(cohorts[0], chunk)]
    return {"cohort": cohorts[0], "chunk": chunks[0]}


def _halved(number: int) -> list[int]:
    """The number, its half, ... 1."""
    return [number >> shift for shift in range(number.bit_length())]


def _resident_bytes() -> float:
    """What this process holds now; its peak where that is not told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return peak_memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _bytes(size: float) -> str:
    if math.isinf(size):
        return "unknown memory"
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e3:,.1f} kB"
