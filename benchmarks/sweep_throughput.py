"""Trials a second of a sweep in one program, by how many run at once; prints JSON.

`digits` is the preset with 10 clients, one step and six rounds, which overhead decides; `network, fixed` and `network,
tsfa` are channel and control alone, 256 clients and 100 rounds. Trials differ in their seeds. Compiling is apart; what
is timed ends with the metrics on the host. `ratio` is over the fewest at once.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax

from fedjax_lora import use_cpu_cores
from fedjax_lora.config.experiment import load_config
from fedjax_lora.config.groups import Group, grouped
from fedjax_lora.config.presets import preset
from fedjax_lora.sim.alone import arguments, trials_alone
from fedjax_lora.sim.trials import Lanes

SMALL = ["clients.count=10", "local.steps=1"]
NETWORK = ["clients.count=256", "pretrain.steps=1"]
CONTROLS = {
    "fixed": "control={name: fixed, keep_ratio: 0.5}",
    "tsfa": "control={name: tsfa, V: 10.0, latency_budget_s: 2.0}",
}


class Program(NamedTuple):
    """So many trials at once: `run` plays all of them anew. compile_s: seconds of tracing and compiling."""

    run: Callable[[], Any]
    compile_s: float


def group(overrides: list[str], trials: int) -> Group:
    """So many seeds of the preset `digits`."""
    base = preset("digits")
    (found,), _ = grouped([load_config(None, [*overrides, f"seed={seed}"], base=base) for seed in range(trials)])
    return found


def training(of: Group, at_once: int, rounds: int) -> Program:
    """Federated training of the first trials."""
    lanes, trials = Lanes(of.simulation, at_once), of.trials[:at_once]

    def run() -> Any:
        return [metrics for _, metrics in lanes.segments(trials, lanes.init(trials), rounds)]

    run()
    return Program(run, lanes.compile_s)


def network(of: Group, at_once: int, rounds: int) -> Program:
    """Channel and control of the first trials."""
    given = arguments(of.simulation, of.trials[:at_once])
    started = time.perf_counter()
    program = trials_alone(of.simulation, rounds).lower(*given).compile()
    compile_s = time.perf_counter() - started
    return Program(lambda: jax.device_get(program(*given)), compile_s)


def measure(make: Callable[[Group, int, int], Program], of: Group, options: argparse.Namespace, rounds: int) -> dict:
    """Rows by trials at once, and what the most are over the fewest."""
    made = {at_once: make(of, at_once, rounds) for at_once in options.at_once}
    seconds = common.in_turns({str(n): program.run for n, program in made.items()}, options.repeats, 0.0)
    rows = []
    for at_once, program in made.items():
        rate = common.spread([at_once / s for s in seconds[str(at_once)]])
        rows.append({"at_once": at_once, "compile_s": program.compile_s, "trials_per_s": rate})
    least = rows[0]["trials_per_s"]["median"]
    for row in rows:
        row["ratio"] = row["trials_per_s"]["median"] / least
    return {"rounds": rounds, "rows": rows}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[2, 8, 64], help="multiples of the devices (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="of digits (%(default)s)")
    parser.add_argument("--network-rounds", type=int, default=100, help="of the network (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=["digits", *CONTROLS], default=["digits", *CONTROLS])
    parser.add_argument("--repeats", type=int, default=5, help="turns (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    use_cpu_cores()
    if wrong := [n for n in options.at_once if n % jax.device_count()]:
        parser.error(f"--at-once must be multiples of the {jax.device_count()} devices, got {wrong[0]}")
    options.at_once, result = sorted(options.at_once), {"benchmark": "sweep_throughput"}
    result |= {"environment": common.environment(), "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    result["parts"] = {}
    for name in options.parts:
        if name == "digits":
            of = group([*SMALL, f"rounds={options.rounds}", f"engine.eval_every={options.rounds}"], options.at_once[-1])
            found = measure(training, of, options, options.rounds)
        else:
            name, of = f"network, {name}", group([*NETWORK, CONTROLS[name]], options.at_once[-1])
            found = measure(network, of, options, options.network_rounds)
        result["parts"][name] = found
        common.note(f"{name}: {[round(row['trials_per_s']['median'], 2) for row in found['rows']]} trials/s")
    common.emit(result, options.out)


if __name__ == "__main__":
    main()
