"""Where the time of a run goes, over all its starts: `times.jsonl`, a line at the end of each piece of work.

A line has `at`, seconds since 1970, and `part`, what was done since the line before. A start that was killed leaves
no line at its end, but one of `alive` at least every ten seconds.
"""

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from fedjax_lora.core.errors import RunWarning
from fedjax_lora.io.files import write_atomically

TIMES = "times.jsonl"

WORK = ("rounds", "data", "compile", "checkpoint", "other")
PARTS = (*WORK, "lost", "down")
"""What time goes to.

rounds: rounds that the run consists of, with their evaluations. data: reading the model and the data. compile: tracing
and compiling, with the evaluation before the first round. checkpoint: writing the log, and waiting for checkpoints.
other: all else that a start does. lost: rounds that were computed again, and what a kill has cut off. down: between two
starts, with what Python takes to start.
"""

_START, _ALIVE = "start", "alive"
_INTERVAL_S = 10.0


def spent(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each of `PARTS`; together all that lie between the first line and the last.

    A `start` names the round that it goes on from: what was computed beyond it is lost.
    """
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    rounds: list[tuple[int, float]] = []
    since = alive = None
    for line in lines:
        at, part = line["at"], line["part"]
        if part == _START and since is not None and alive is not None:
            found["lost"] += alive - since + sum(seconds for last, seconds in rounds if last > line["round"])
            found["down"] += at - alive
            rounds = [(last, seconds) for last, seconds in rounds if last <= line["round"]]
        elif part == "rounds" and since is not None:
            rounds.append((line["round"], at - since))
        elif part in WORK and since is not None:
            found[part] += at - since
        since = since if part == _ALIVE else at
        alive = at
    found["rounds"] = sum((seconds for _, seconds in rounds), 0.0)
    return found


def told(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary says: `goodput`, the share of all time that went to `rounds`; `spent_s` and `starts`."""
    lines = list(lines)
    parts = spent(lines)
    whole = sum(parts.values())
    goodput = parts["rounds"] / whole if whole > 0 else None
    return {"goodput": goodput, "spent_s": parts, "starts": sum(line["part"] == _START for line in lines)}


def sentence(summary: Mapping[str, Any]) -> str:
    """What a summary that tells goodput says of the time, in one line."""
    parts = summary["spent_s"]
    starts = "1 start" if summary["starts"] == 1 else f"{summary['starts']} starts"
    of = ", ".join(f"{name} {parts[name]:.1f}" for name in PARTS if parts[name] >= 0.05)
    return f"goodput {summary['goodput']:.3f} of {sum(parts.values()):.1f} s in {starts}: {of}"


class Times:
    """The times of a run as they come about while its block runs; on disk once `keep_in` is called."""

    def __init__(self):
        # Of one clock that is never set back.
        self._offset_s = time.time() - time.monotonic()
        self._lines: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._add({"part": _START, "round": 0})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._file:
            self._file.close()  # without a buffer: nothing is left to write

    def keep_in(self, folder: Path, going_on_from: int = 0) -> None:
        """From now on in a run's folder, behind what it holds: this start goes on from so many rounds.

        A file that was damaged is warned of, and begun anew.
        """
        path = folder / TIMES
        try:
            before = _read(path)
        except ValueError as error:
            warnings.warn(f"the times of earlier starts are lost: {error}", RunWarning, stacklevel=2)
            before = []
        with self._writing:
            self._lines[0]["round"] = going_on_from
            behind_s = before[-1]["at"] - self._lines[0]["at"] if before else 0.0
            if behind_s > 0:  # the clock was set back
                self._offset_s += behind_s
                self._lines = [line | {"at": round(line["at"] + behind_s, 3)} for line in self._lines]
            self._lines = [*before, *self._lines]
            write_atomically(path, "".join(map(_text, self._lines)))  # without a last line that a kill has torn
            self._file = path.open("ab", buffering=0)
        self._thread.start()

    def mark(self, part: str, last_round: int | None = None) -> None:
        """What was done since the last mark, one of `WORK`; `rounds` with the last of them."""
        self._add({"part": part} | ({} if last_round is None else {"round": last_round}))

    def told(self) -> dict[str, Any]:
        """What a summary says until now."""
        return told(self._lines)

    def _add(self, line: dict[str, Any]) -> None:
        with self._writing:
            line = {"at": round(self._offset_s + time.monotonic(), 3), **line}
            self._lines.append(line)
            if self._file:
                self._file.write(_text(line).encode())

    def _beat(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk stops the run elsewhere, by name
                self._add({"part": _ALIVE})


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file. A last line without its newline does not count.

    Raises:
      ValueError: a line is none that was written, or is of a time before that of the line before.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], start=1):
        try:
            line = json.loads(text)
            timely = line["at"] >= 0 and (not lines or line["at"] >= lines[-1]["at"])
            named = line["part"] in (*WORK, _START, _ALIVE)
            numbered = line["part"] not in (_START, "rounds") or type(line["round"]) is int
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not as it was written") from error
        if not (timely and named and numbered):
            raise ValueError(f"{path} line {number} is not as it was written")
        lines.append(line)
    return lines
