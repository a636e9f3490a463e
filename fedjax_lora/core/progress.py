"""What a long computation is at: a bar in a terminal, lines elsewhere, at least one every half a minute."""

import datetime
import math
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.status import Status

from fedjax_lora.core.types import FedState, Metrics

INTERVAL_S = 30.0
"""Longest silence outside a terminal."""


class Progress:
    """Shows what is being done, on a console, while its block runs.

    Outside a terminal a line is repeated with the time that has passed whenever nothing was printed for `interval_s`
    seconds, from a thread: a compiler or a long segment does not call back.
    """

    def __init__(self, console: Console, interval_s: float = INTERVAL_S):
        self.console = console
        self._interval_s = interval_s
        self._is_live = console.is_terminal and not console.quiet
        self._display: Status | Bar | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._printed_s = time.monotonic()
        self._counted: tuple[float, int, Bar] | None = None
        self._now("starting")

    def __enter__(self) -> Self:
        if not self._is_live:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show(None)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def print(self, line: str) -> None:
        """A line of its own."""
        self._printed_s = time.monotonic()
        self.console.print(line, soft_wrap=True, markup=False)

    def stage(self, what: str) -> None:
        """From now on, `what` is being done."""
        self._now(what)
        self._show(Status(what, console=self.console))

    def begin(self, line: str) -> None:
        """A line that says what is being done from now on."""
        self.print(line)
        self.stage(line)

    def rounds(
        self, segments: Iterator[tuple[FedState, Metrics]], done: int, total: int, judged_by: str = "accuracy"
    ) -> Iterator[tuple[FedState, Metrics]]:
        """The same segments; each counts once the caller asks for the next.

        `done` rounds of `total` lie behind; `judged_by` is that of the task.
        """
        bar = _bar(self.console)
        task = bar.add_task("round", total=total, completed=done, status="")
        self._now(f"after round {done}/{total}")
        self._show(bar)
        for state, metrics in segments:
            yield state, metrics
            done = int(metrics.round[-1])
            self._now(f"after round {done}/{total}")
            status = _status(metrics, judged_by)
            bar.update(task, completed=done, status=status)
            if not self._is_live:
                self.print(f"round {done}/{total}  {status}")

    def count(self, what: str, done: int, total: int, status: str = "") -> None:
        """So many of so many things are done, since the first call; says when all will be."""
        if self._counted is None:
            self._counted = (time.monotonic(), done, _bar(self.console))
            self._counted[2].add_task(what, total=total, completed=done, status=status)
        since_s, before, bar = self._counted
        self._now(f"after {what} {done}/{total}")
        bar.update(bar.task_ids[0], completed=done, total=total, status=status)
        if self._display is not bar:
            self._show(bar)
        if not self._is_live:
            rate = (done - before) / max(time.monotonic() - since_s, 1e-9)
            left = f"  ETA {_minutes((total - done) / rate)}" if rate > 0 else ""
            self.print(f"{what} {done}/{total}{left}  {status}".rstrip())

    def _now(self, what: str) -> None:
        self._what, self._since_s = what, time.monotonic()

    def _show(self, display: Status | Bar | None) -> None:
        """In a terminal one display takes the other's place."""
        if self._display:
            self._display.stop()
        self._display = display if self._is_live else None
        if self._display:
            self._display.start()

    def _beat(self) -> None:
        while not self._ended.wait(self._printed_s + self._interval_s - time.monotonic()):
            now = time.monotonic()
            if now >= self._printed_s + self._interval_s:
                self.print(f"{self._what}; {now - self._since_s:.0f} s so far")


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


def _minutes(seconds: float) -> str:
    """A duration as `0:05:30`."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _status(metrics: Metrics, judged_by: str) -> str:
    """The rounds since the last evaluation in a few words: the loss of the last one, and means."""
    uplink_mb = int(metrics.uplink_bits.sum()) / 8e6
    found = metrics.methods[f"task/{judged_by}"] if judged_by != "accuracy" else metrics.eval_accuracy
    return (
        f"loss {measured(metrics.train_loss[-1], '.3f')}  "
        f"{standing(metrics.eval_loss[-1], found[-1], judged_by=judged_by)}  "
        f"latency {float(metrics.latency_s.mean()):.2f} s, uplink {uplink_mb / len(metrics.round):.2f} MB a round"
    )


def standing(loss: Any, found: Any, which: str = "", judged_by: str = "accuracy") -> str:
    """An evaluation in a word: what the task is judged by, or the loss where that is not measured.

    `which` of them is told after its name, as ` before:`.
    """
    if math.isnan(found) and not math.isnan(loss):
        return f"test loss{which} {measured(loss)}"
    return f"{judged_by}{which} {measured(found)}"


def measured(value: Any, form: str = ".4f") -> str:
    """A number of any kind, or that it was not measured where it is NaN."""
    return "not measured" if math.isnan(value) else format(float(value), form)
