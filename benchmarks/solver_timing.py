"""How the solvers are timed."""

import time
from collections.abc import Callable
from typing import Any

import common
import jax


def timed(function: Callable[..., Any], cohorts: list[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """Compile time and seconds of a call, in turn over the cohorts."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*cohorts[0]).compile()
    compile_s = time.perf_counter() - started
    times, end = [], time.perf_counter() + seconds
    for case in cohorts:
        jax.block_until_ready(compiled(*case))
    while time.perf_counter() < end or len(times) < 2 * len(cohorts):
        case = cohorts[len(times) % len(cohorts)]
        started = time.perf_counter()
        jax.block_until_ready(compiled(*case))
        times.append(time.perf_counter() - started)
    return {"compile_s": compile_s, "call_s": common.spread(times), "calls": len(times)}
