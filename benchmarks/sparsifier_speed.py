"""What choosing components costs: by norms (`soft`), by thin and by full SVD of the product; prints JSON.

One client's adapter of one BERT-sized module: 12 layers, 768 by 768, r = 8. Each is one jitted program that gives the
energies of all components, timed in turns, so that all see the same load; the median of the turns counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import common
import jax

from fedjax_lora.sparsifiers.soft import importance
from fedjax_lora.sparsifiers.svd import full_svd, thin_svd

LAYERS, WIDTH, RANK = 12, 768, 8
METHODS = {
    "norms": lambda a, b, a0, b0: importance(a, b, a0, b0),
    "thin SVD": lambda a, b, a0, b0: thin_svd(a, b).s,
    "full SVD": lambda a, b, a0, b0: full_svd(a, b).s,
}


def main() -> None:
    """Time all methods in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsifier_speed.json"))
    options = parser.parse_args()
    environment = common.environment()
    a, a0 = jax.random.normal(jax.random.key(0), (2, LAYERS, WIDTH, RANK))
    b, b0 = jax.random.normal(jax.random.key(1), (2, LAYERS, RANK, WIDTH))
    programs = {name: jax.jit(method).lower(a, b, a0, b0).compile() for name, method in METHODS.items()}
    for program in programs.values():
        jax.block_until_ready(program(a, b, a0, b0))
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(options.repeats):
        for name, program in programs.items():
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < 0.2:
                jax.block_until_ready(program(a, b, a0, b0))
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "environment": environment,
        "shape": {"layers": LAYERS, "n_in": WIDTH, "n_out": WIDTH, "rank": RANK},
        "seconds": seconds,
        "median_s": median,
        "full_svd_over": {name: median["full SVD"] / value for name, value in median.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
