"""SIGINT and SIGTERM: the first lets what is running end, and be saved; a second one ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Self

from fedjax_lora.core import hosts

_ASK_TO_LEAVE = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A command that leaves because a signal asks for it.

    number: of the signal. saved: what is on disk, in words, and can be gone on with; None where nothing is.
    """

    def __init__(self, number: int, saved: str | None = None):
        super().__init__(number, saved)
        self.number = number
        self.saved = saved

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}: {self.saved}"


class Signals:
    """What has been asked for, see `heard`.

    running: what is to end first, in words; while it is None, a signal raises Interrupted as soon as Python runs.
    """

    def __init__(self):
        self.running: str | None = None
        self._number: int | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    @contextlib.contextmanager
    def ending(self, running: str) -> Iterator[Self]:
        """While the block runs, a signal waits for `leave`."""
        self.running = running
        try:
            yield self
        finally:
            self.running = None

    def agree(self) -> None:
        """Have heard what any process of the run has; all of them come here."""
        told = hosts.largest(self._number or 0)
        self._number = self._number or told or None  # one may have come meanwhile

    def leave(self, saved: str) -> None:
        """To be called where all is saved; raises Interrupted if a signal has come."""
        if self._number is not None:
            raise Interrupted(self._number, saved)

    def handle(self, number: int, frame: object) -> None:
        """Python's own handler, in the main thread; it has to wait as long as a program is running there."""
        del frame
        self._number = self._number or number
        if self.running is None:
            raise Interrupted(number)

    def listen(self, pipe: int) -> None:
        """Hear of each signal at once, in a thread of its own, until the pipe is closed."""
        times = 0
        while byte := os.read(pipe, 1):
            number = byte[0]
            if number not in _ASK_TO_LEAVE:
                continue
            times += 1
            name = signal.Signals(number).name
            if times > 1:
                _say(f"{name}: left at once; what was saved before stays")
                os._exit(128 + number)
            self._number = number
            if self.running is not None:
                _say(f"{name}: leaves once {self.running} is saved; a second signal leaves at once, without")


@contextlib.contextmanager
def heard() -> Iterator[Signals]:
    """Hear SIGINT and SIGTERM while the block runs, in the main thread; in another one nothing changes."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    thread = threading.Thread(target=signals.listen, args=(receiving,), daemon=True)
    thread.start()
    before_fd = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    before = {number: signal.signal(number, signals.handle) for number in _ASK_TO_LEAVE}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(sending)
        thread.join()
        os.close(receiving)


def _say(line: str) -> None:
    print(f"fedjax-lora: {line}", file=sys.stderr, flush=True)
