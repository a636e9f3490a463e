"""Memory and time of one round with a thousand MiniLM clients: SOFT at half of the ranks over a simulated cell.

Run as `python benchmarks/many_clients.py`. The simulation runs in a process of its own, whose
peak memory is the result.
"""

import argparse
import tempfile
from pathlib import Path

from common import DTYPES, Remote, emit, environment, note, workload, workload_arguments

LIMIT_BYTES = 4_000_000_000


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    workload_arguments(parser, clients=1000)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrix products (%(default)s)")
    options = parser.parse_args()
    shape = workload(options)
    result = {"benchmark": "many_clients", "environment": environment()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape.write(folder)
        note("building the engine")
        arguments = {"dtype": options.dtype, "client_chunk": "auto", "wireless": True}
        with Remote("engine:Engine", workload=shape, folder=folder, **arguments) as engine:
            before = engine.call("peak_memory_bytes")
            note(f"one round of {shape.samples} samples")
            seconds, loss = engine.call("round")
            peak = engine.call("peak_memory_bytes")
            result["workload"] = {
                **vars(shape),
                "model": Path(shape.model).parent.name,
                "dtype": options.dtype,
                "samples_per_round": shape.samples,
            }
            result["results"] = {
                **engine.call("describe"),
                "round_s": seconds,
                "samples_per_s": shape.samples / seconds,
                "train_loss": loss,
                "peak_memory_bytes_before_the_round": before,
                "peak_memory_bytes": peak,
                "limit_bytes": LIMIT_BYTES,
                "under_limit": peak < LIMIT_BYTES,
            }
    emit(result, options.out)


if __name__ == "__main__":
    main()
