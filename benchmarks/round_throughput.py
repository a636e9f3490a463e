"""Throughput of one federated round of MiniLM LoRA, side by side with a PyTorch + PEFT loop over clients.

Run as `python benchmarks/round_throughput.py`. Both sides train on the same batches from the
same adapters, in turns (A B A B ...), each in a process of its own; the script checks that their losses agree.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    DTYPES,
    FLOP_FORMULA,
    Dtype,
    PeerSettings,
    Quiet,
    Remote,
    Workload,
    available_memory_bytes,
    emit,
    environment,
    note,
    spread,
    workload,
    workload_arguments,
)

CHECKED_ROUNDS = 2
"""Rounds whose losses are compared; they also warm both sides up. From the second on, both factors have moved."""

LOSS_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 3e-2}

CHUNKS = (1, 2, 4, 8, 16, 32)
SWEEP_ROUNDS = 3
TUNED_CLIENTS = 4


class RoundWork(NamedTuple):
    """What a round computes: each sentence once. tokens: real ones. flop: of FLOP_FORMULA."""

    samples: int
    tokens: int
    flop: int


def main() -> None:
    """Measure what the command line asks for."""
    options = _parser().parse_args()
    shape = workload(options)
    described = {**vars(shape), "text": shape.text and shape.text.name, "model": Path(shape.model).parent.name}
    emit(measured("round_throughput", shape, described, options), options.out)


def measured(name: str, shape: Workload, described: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The result of a benchmark: both sides in each dtype. options: of `measuring_arguments`."""
    result: dict[str, Any] = {
        "benchmark": name,
        "environment": environment(),
        "workload": {
            **described,
            "samples_per_round": shape.samples,
            "engine": "dense sparsifier, ideal control: nothing is left out, as in the peer; its error norms, "
            "diagnostics and an evaluation on two examples are inside its times",
        },
        "flop_model": {"formula": FLOP_FORMULA},
        "results": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape.write(folder)
        for dtype in options.dtypes:
            result["results"][dtype] = _measure(shape, folder, dtype, options)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    workload_arguments(parser, clients=32)
    measuring_arguments(parser)
    return parser


def measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of how it is measured."""
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each side (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the matrix products (both)")
    parser.add_argument("--skip-peer", action="store_true", help="measure the engine alone")
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out of the peer's tuning")
    parser.add_argument("--skip-sweep", action="store_true", help="leave out the sweep of client_chunk")


def _measure(shape: Workload, folder: Path, dtype: Dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one dtype."""
    note(f"{dtype}: building the engine")
    with Remote(shape.engine, **_engine_arguments(shape, folder, dtype, "auto")) as engine:
        lengths = engine.call("tokens")[1].sum(1).tolist()
        work = RoundWork(shape.samples, sum(lengths), shape.flop(lengths))
        if options.skip_peer:
            result = _alone(work, engine, options.repeats)
        else:
            result = _side_by_side(shape, work, engine, dtype, options)
    result["round"] = work._asdict()
    if not options.skip_sweep:
        result["client_chunk_sweep"] = _sweep(shape, folder, dtype)
    return result


def _engine_arguments(shape: Workload, folder: Path, dtype: Dtype, chunk: int | str) -> dict[str, Any]:
    return {"workload": shape, "folder": folder, "dtype": dtype, "client_chunk": chunk, "wireless": False}


def _alone(work: RoundWork, engine: Remote, repeats: int) -> dict[str, Any]:
    for _ in range(CHECKED_ROUNDS):
        engine.call("round")
    quiet, seconds, rates = Quiet(engine), [], []
    for _ in range(repeats):
        seconds.append(engine.call("round")[0])
        rates.append(engine.call("matmul_gflops"))
    return {
        "cpu_share_of_others": quiet.share_of_others(),
        "matmul_gflops": {"jax": max(rates)},
        "engine": _report(work, engine, seconds, max(rates)),
    }


def _side_by_side(
    shape: Workload, work: RoundWork, engine: Remote, dtype: Dtype, options: argparse.Namespace
) -> dict[str, Any]:
    """Both sides in turns, the peer at the best settings found."""
    begin = (engine.call("adapters"), engine.call("tokens"), engine.call("labels"))
    tried = _tune(shape, engine.call("rows")[:TUNED_CLIENTS], dtype, begin, not options.skip_compile)
    best = max((t for t in tried if "samples_per_s" in t), key=lambda t: t["samples_per_s"])
    settings = PeerSettings(best["attention"], best["frozen"], best["compile"])

    note(f"{dtype}: {CHECKED_ROUNDS} rounds to check, {options.repeats} to time")
    with Remote(shape.peer, workload=shape, dtype=dtype, settings=settings) as peer:
        compile_s = peer.call("start", *begin)
        losses = [_pair(engine, peer)[1] for _ in range(CHECKED_ROUNDS)]
        distance = peer.call("adapters_distance", engine.call("adapters"))
        quiet, seconds, jax_rates, torch_rates = Quiet(engine, peer), [], [], []
        for _ in range(options.repeats):
            seconds.append(_pair(engine, peer)[0])
            jax_rates.append(engine.call("matmul_gflops"))
            torch_rates.append(peer.call("matmul_gflops"))
        ours, theirs = zip(*seconds, strict=True)
        best_rate = max(*jax_rates, *torch_rates)
        share_of_others = quiet.share_of_others()
        difference = max(abs(a - b) for a, b in losses)
        return {
            "cpu_share_of_others": share_of_others,
            "ratio": spread([b / a for a, b in seconds]),
            "matmul_gflops": {"jax": max(jax_rates), "torch": max(torch_rates)},
            "engine": _report(work, engine, ours, best_rate),
            "peer": {
                **_report(work, peer, theirs, best_rate),
                "first_client_s": compile_s,
                "tried": tried,
            },
            "check": {
                "rounds": CHECKED_ROUNDS,
                "engine_loss": [a for a, _ in losses],
                "peer_loss": [b for _, b in losses],
                "largest_difference": difference,
                "tolerance": LOSS_TOLERANCE[dtype],
                "agrees": difference <= LOSS_TOLERANCE[dtype],
                "relative_distance_of_adapters": distance,
            },
        }


def _pair(engine: Remote, peer: Remote) -> tuple[tuple[float, float], tuple[float, float]]:
    """One round of each side on the same batches: their seconds, and their losses."""
    rows = engine.call("rows")
    ours, our_loss = engine.call("round")
    theirs, their_loss = peer.call("round", rows)
    return (ours, theirs), (our_loss, their_loss)


def _tune(shape: Workload, rows: Any, dtype: Dtype, begin: tuple, with_compile: bool) -> list[dict[str, Any]]:
    """Samples/s of the peer at each of its settings on a few clients; an error where one does not work."""
    tried = []
    for settings in _candidates(dtype, with_compile):
        try:
            with Remote(shape.peer, workload=shape, dtype=dtype, settings=settings) as peer:
                peer.call("start", *begin)
                fastest = min(peer.call("round", rows)[0] for _ in range(3))
            found: dict[str, Any] = {"samples_per_s": rows.size / fastest}
        except RuntimeError as error:
            found = {"error": str(error).strip().splitlines()[-1]}
        tried.append({**settings._asdict(), **found})
        note(f"{dtype}: peer tried at {tried[-1]}")
    return tried


def _candidates(dtype: Dtype, with_compile: bool) -> list[PeerSettings]:
    held: tuple[Dtype, ...] = ("float32",) if dtype == "float32" else ("float32", "bfloat16")
    return [
        PeerSettings(attention, frozen, compiled)
        for compiled in ((False, True) if with_compile else (False,))
        for frozen in held
        for attention in ("sdpa", "eager")
    ]


def _report(work: RoundWork, side: Remote, seconds: Any, matmul_gflops: float) -> dict[str, Any]:
    samples_per_s = spread([work.samples / s for s in seconds])
    gflops = samples_per_s["median"] / work.samples * work.flop / 1e9
    return {
        **side.call("describe"),
        "samples_per_s": samples_per_s,
        "tokens_per_s": samples_per_s["median"] / work.samples * work.tokens,
        "round_s": list(seconds),
        "gflops": gflops,
        "share_of_matmul": gflops / matmul_gflops,
        "peak_memory_bytes": side.call("peak_memory_bytes"),
    }


def _sweep(shape: Workload, folder: Path, dtype: Dtype) -> list[dict[str, Any]]:
    """Engine's throughput and memory by clients trained at once, up to where the memory may not suffice."""
    swept: list[dict[str, Any]] = []
    for chunk in (chunk for chunk in CHUNKS if chunk <= shape.clients):
        if swept and 2 * swept[-1]["peak_memory_bytes"] > available_memory_bytes():
            note(f"{dtype}: client_chunk {chunk} and above are left out, for lack of memory")
            break
        with Remote(shape.engine, **_engine_arguments(shape, folder, dtype, chunk)) as engine:
            engine.call("round")
            rates = [shape.samples / engine.call("round")[0] for _ in range(SWEEP_ROUNDS)]
            swept.append(
                {
                    "client_chunk": chunk,
                    "samples_per_s": spread(rates),
                    "compile_s": engine.call("describe")["compile_s"],
                    "peak_memory_bytes": engine.call("peak_memory_bytes"),
                }
            )
        note(f"{dtype}: {swept[-1]}")
    return swept


if __name__ == "__main__":
    main()
