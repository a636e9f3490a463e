"""Orbax, of which a user hears one line: what it logs of a failure, with tracebacks of its threads, is left out."""

import contextlib
import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator

_LOGGERS = ("absl", "asyncio")
_ENDS = 100
"""Characters of an error that are told from its start and from its end, where a cause stands behind long paths."""


@contextlib.contextmanager
def failing_in_one_line(what: str) -> Iterator[None]:
    """`what` and the reason, in one line, in place of any error of the block.

    Raises:
      ValueError: where the block raises an exception.
    """
    _hush()
    try:
        yield
        return
    except Exception as error:  # Orbax and TensorStore share no base class
        text = " ".join(str(error).split()) or type(error).__name__
        _let_go(error)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
        gc.collect()
    raise ValueError(f"{what}: {text if len(text) <= 2 * _ENDS else f'{text[:_ENDS]} ... {text[-_ENDS:]}'}")


def _let_go(error: BaseException | None) -> None:
    """Let go of reads and writes that no one waits for any more, which the frames of an error hold."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _hush() -> None:
    """From now on leave out what Orbax logs, and what its threads say of loops that are closed."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_not_of_orbax)  # once, however often
    if sys.unraisablehook is not _hook.told:
        _hook.before, sys.unraisablehook = sys.unraisablehook, _hook.told


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


class _Hook:
    """Python's hook for errors that no one can catch, without those of loops that are closed."""

    def __init__(self):
        self.before = sys.__unraisablehook__
        self.told = self._tell

    def _tell(self, what: "sys.UnraisableHookArgs", /) -> None:
        if str(what.exc_value) != "Event loop is closed":
            self.before(what)


_hook = _Hook()
