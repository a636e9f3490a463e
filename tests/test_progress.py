"""What is printed outside a terminal. The oracle is the clock: waiting longer than the interval brings a line."""

import dataclasses
import io
import threading
import time

import jax
import numpy as np
from rich.console import Console

from fedjax_lora.core.count import Count
from fedjax_lora.core.progress import Progress
from fedjax_lora.core.types import Metrics


def lines_of(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def wait_for_lines(file: io.StringIO, number: int) -> list[str]:
    deadline = time.monotonic() + 30
    while len(lines_of(file)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return lines_of(file)


def segment(last: int, rounds: int = 2) -> Metrics:
    """Metrics of `rounds` rounds that end with round `last`, on the host."""
    values = {name: np.zeros(rounds) for name in Metrics.__dataclass_fields__}
    nothing = Count(high=np.zeros((rounds, 1), np.uint32), low=np.zeros((rounds, 1), np.uint32))
    counts = {"round": np.arange(last - rounds + 1, last + 1), "uplink": nothing, "downlink": nothing, "methods": {}}
    return Metrics(**values | counts)


def test_what_takes_long_says_so_again_and_again_until_its_end():
    file = io.StringIO()
    with Progress(Console(file=file), interval_s=0.05) as progress:
        progress.stage("compiling a round")
        lines = wait_for_lines(file, 3)
    ended = lines_of(file)
    time.sleep(0.2)
    assert lines_of(file) == ended
    assert all(line.startswith("compiling a round; ") and line.endswith(" s so far") for line in lines)


def test_a_long_segment_tells_after_which_round():
    file = io.StringIO()

    def slow():
        yield None, segment(2)
        wait_for_lines(file, 3)
        yield None, segment(4)

    with Progress(Console(file=file), interval_s=0.05) as progress:
        for _ in progress.rounds(slow(), 0, 4):
            pass
    lines = [line for line in lines_of(file) if not line.startswith("after round 0/4")]
    assert lines[0].startswith("round 2/4  loss 0.000")
    assert lines[1].startswith("after round 2/4; ") and lines[-1].startswith("round 4/4  loss 0.000")


def test_where_lines_come_often_none_is_added():
    """The interval is longer than the test."""
    file = io.StringIO()
    with Progress(Console(file=file), interval_s=60.0) as progress:
        progress.stage("compiling a round")
        progress.begin("pilot: 8 rounds")
        list(progress.rounds(iter([(None, segment(2)), (None, segment(4))]), 0, 4))
    assert [line.split("  ")[0] for line in lines_of(file)] == ["pilot: 8 rounds", "round 2/4", "round 4/4"]


def test_a_line_shows_what_the_task_is_judged_by():
    """By hand: of two rounds the last is evaluated."""
    file = io.StringIO()
    metrics = dataclasses.replace(segment(2), methods={"task/perplexity": np.array([np.nan, 12.5])})
    with Progress(Console(file=file)) as progress:
        list(progress.rounds(iter([(None, metrics)]), 0, 2, "perplexity"))
    assert lines_of(file)[0].startswith("round 2/2  loss 0.000  perplexity 12.5000  latency")


def test_a_quiet_console_stays_quiet_and_an_error_ends_the_thread():
    file, threads = io.StringIO(), threading.active_count()
    try:
        with Progress(Console(file=file, quiet=True, force_terminal=True), interval_s=0.01) as progress:
            progress.stage("reading")
            time.sleep(0.1)
            raise ValueError("of the caller")
    except ValueError:
        pass
    assert not file.getvalue() and threading.active_count() == threads


def test_a_terminal_shows_a_bar_and_no_lines():
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=100), interval_s=0.01) as progress:
        progress.stage("compiling a round")
        list(progress.rounds(iter([(None, segment(2)), (None, segment(4))]), 0, 4))
    shown = file.getvalue()
    assert "compiling a round" in shown and "4/4" in shown and "so far" not in shown


def test_progress_of_a_compiler_that_does_not_call_back():
    """Lines come while XLA compiles: it holds no lock that Python's threads need."""
    file = io.StringIO()

    def program(x):
        for _ in range(150):
            x = jax.numpy.sin(x @ x)
        return x

    lowered = jax.jit(program).lower(np.ones((7, 7), np.float32))
    with Progress(Console(file=file), interval_s=0.02) as progress:
        progress.stage("compiling")
        lowered.compile()
    assert lines_of(file)
