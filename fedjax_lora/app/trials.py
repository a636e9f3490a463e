"""Trials played to their end: those of one structure in batches of as many as run side by side."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from fedjax_lora.app.halving import Halving, Point
from fedjax_lora.config.groups import Group
from fedjax_lora.core import trees
from fedjax_lora.core.progress import Progress, standing
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.sim.trials import Lanes, trials_at_once, unstacked


class Begun(NamedTuple):
    """What is known of a trial when it is about to go on.

    initial_accuracy: before round 1. compile_s: seconds of compiling its program, which it shares with others.
    started_s: on the clock of `time.perf_counter`. at_once: trials beside each other.
    """

    initial_accuracy: float
    compile_s: float
    started_s: float
    at_once: int


class Keeper(Protocol):
    """Where what trials come to is kept; a trial is told by its place among all."""

    def begin(self, place: int, begun: Begun) -> None:
        """A trial is about to go on."""
        ...

    def keep(self, place: int, state: FedState, metrics: Metrics) -> None:
        """A segment of a trial has ended: its state, on the host, and the metrics of its rounds."""
        ...

    def kept(self) -> None:
        """The segments of all trials side by side are kept: where one may leave."""
        ...

    def points(self, place: int, halving: Halving, rung: int) -> list[Point]:
        """The evaluations of a trial up to a round, oldest first."""
        ...


class Standing(NamedTuple):
    """Where a trial stands before it goes on: rounds done, and the state after them; None where it has ended."""

    done: int
    state: FedState | None


class Entrant(NamedTuple):
    """A trial on its way.

    group: of its structure. number: within the group. done: rounds.
    state: after them, on the host; None before round 1, and after the last.
    """

    group: Group
    number: int
    done: int = 0
    state: FedState | None = None

    @property
    def place(self) -> int:
        """Among all trials."""
        return self.group.places[self.number]

    @property
    def rounds(self) -> int:
        """How many it is to have in the end."""
        return self.group.configs[self.number].rounds


def play(
    groups: Sequence[Group],
    keeper: Keeper,
    progress: Progress,
    begun: Mapping[int, Standing] | None = None,
    halving: Halving | None = None,
) -> set[int]:
    """Advance all trials to their last round, each segment kept as it ends.

    Args:
      groups: of one structure each.
      keeper: told of what happens.
      progress: shows how far all are.
      begun: place -> where the trials stand that go on, or have ended.
      halving: stops the trials that lag behind; None stops none.

    Returns:
      The places of the trials that were stopped.
    """
    begun = begun or {}
    trials = [_first(group, number, begun) for group in groups for number in range(len(group.trials))]
    player = _Player(keeper, progress, sum(trial.rounds for trial in trials), sum(trial.done for trial in trials))
    stopped: set[int] = set()
    if halving:
        eval_every = max(group.simulation.eval_every for group in groups)
        for rung in halving.rungs(eval_every, max(trial.rounds for trial in trials)):
            trials = player.advance(trials, rung)
            losers = halving.losers({trial.place: keeper.points(trial.place, halving, rung) for trial in trials})
            losers -= {trial.place for trial in trials if trial.done == trial.rounds}
            player.total -= sum(trial.rounds - trial.done for trial in trials if trial.place in losers)
            trials = [trial for trial in trials if trial.place not in losers]
            stopped |= losers
    player.advance(trials)
    return stopped


def announce(console: Console, groups: Sequence[Group], trials: int) -> None:
    """How many trials, programs and trials at once."""
    running = [len(group.trials) for group in groups]
    at_once = [trials_at_once(group.simulation, len(group.trials)) for group in groups]
    listed = ", ".join(f"{count} ({most} at once)" for count, most in zip(running, at_once, strict=True))
    programs = "1 program" if len(groups) == 1 else f"{len(groups)} programs"
    refused = f", {trials - sum(running)} refused" if trials > sum(running) else ""
    console.print(f"{trials} trials{refused}: {programs} for {listed}", soft_wrap=True, markup=False)


def became(last: Mapping[str, Any], stopped: bool) -> str:
    """What became of a trial whose log ends with this line: `ended`, `stopped` or `diverged`."""
    if last["eval_loss"] is None or last["participants"] == 0 < last["nonfinite_clients"]:
        return "diverged"
    return "stopped" if stopped else "ended"


def _first(group: Group, number: int, begun: Mapping[int, Standing]) -> Entrant:
    return Entrant(group, number, *begun.get(group.places[number], Standing(0, None)))


def _best(metrics: Sequence[Metrics]) -> str:
    """Of the last evaluations of trials: the best accuracy and the least loss, whichever is measured."""
    last = [(rows.eval_loss[-1], rows.eval_accuracy[-1]) for rows in metrics]
    losses, accuracies = ([float(x) for x in column if not math.isnan(x)] for column in zip(*last, strict=True))
    return standing(min(losses, default=math.nan), max(accuracies, default=math.nan))


class _Player:
    """Advances trials, and shows how far all are.

    total: rounds of all trials together, as long as none is stopped.
    """

    def __init__(self, keeper: Keeper, progress: Progress, total: int, done: int):
        self.total = total
        self._keeper, self._progress, self._done = keeper, progress, done
        self._programs: dict[tuple[int, int], Lanes] = {}

    def advance(self, trials: Sequence[Entrant], rung: int | None = None) -> list[Entrant]:
        """All trials up to so many rounds (None: to their last); those that are there already stay as they are.

        Those that lag behind, as after a kill, first catch up with the others of their structure.
        """
        found = {trial.place: trial for trial in trials}
        for group in {id(trial.group): trial.group for trial in trials}.values():
            rounds = group.configs[0].rounds  # structure: the same for all of them
            until = rounds if rung is None else min(rung, rounds)
            going = [trial for trial in trials if trial.group is group and trial.done < until]
            if not going:
                continue
            lanes = self._lanes(group, trials_at_once(group.simulation, len(going)))
            for stop in [*sorted({trial.done for trial in going})[1:], until]:
                behind = [found[trial.place] for trial in going if found[trial.place].done < stop]
                for start in range(0, len(behind), lanes.number):
                    batch = behind[start : start + lanes.number]
                    found |= {trial.place: trial for trial in self._side_by_side(batch, lanes, stop)}
        return [found[trial.place] for trial in trials]

    def _lanes(self, group: Group, number: int) -> Lanes:
        """The program of so many lanes, made once."""
        key = group.places[0], number
        if key not in self._programs:
            self._programs[key] = Lanes(group.simulation, number)
        return self._programs[key]

    def _side_by_side(self, trials: list[Entrant], lanes: Lanes, until: int) -> Iterator[Entrant]:
        """One batch; lanes that are left over repeat its last trial, and are not kept."""
        started, filled = time.perf_counter(), [*trials, *[trials[-1]] * (lanes.number - len(trials))]
        given = [trial.group.trials[trial.number] for trial in filled]
        self._progress.stage(f"compiling {lanes.number} trials side by side")
        first = lanes.init(given)
        accuracies = lanes.evaluate(given, first)
        for trial, accuracy in zip(trials, accuracies, strict=False):
            self._keeper.begin(trial.place, Begun(accuracy, lanes.compile_s, started, lanes.number))
        self._progress.count("trial rounds", self._done, self.total)
        held = [trial.state for trial in filled if trial.state is not None]
        states, ended = (trees.stack(held) if held else first), []
        for states, metrics in lanes.segments(given, states, until - trials[0].done):
            ended = unstacked(states)
            for trial, state, rows in zip(trials, ended, metrics, strict=False):
                self._keeper.keep(trial.place, state, rows)
            self._keeper.kept()
            self._done += len(trials) * len(metrics[0].round)
            self._progress.count("trial rounds", self._done, self.total, f"best {_best(metrics)}")
        for trial, state in zip(trials, ended, strict=False):
            yield trial._replace(done=until, state=state if until < trial.rounds else None)
