"""Channel and control alone over transmit power and band: settings a minute, and the mean latency of each."""

import argparse
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

import fedjax_lora as fl

POWERS_DBM = [-10.0, -5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 23.0]
BANDS_HZ = [1e6, 2e6, 5e6, 1e7, 2e7, 4e7, 7e7, 1e8]
CONTROLS = {
    "fixed": ["control={name: fixed, keep_ratio: 0.5}"],
    "tsfa": ["control={name: tsfa, V: 10.0, latency_budget_s: 2.0}"],
}


def measure(overrides: list[str], clients: int, rounds: int, powers: int) -> dict[str, Any]:
    """One sweep over `powers` of the powers and all bands: with compiling, as a user waits for it."""
    config = fl.load_config(None, [f"clients.count={clients}", "pretrain.steps=1", *overrides])
    over = {"wireless.power_dbm": POWERS_DBM[:: len(POWERS_DBM) // powers], "wireless.bandwidth_hz": BANDS_HZ}
    started = time.perf_counter()
    found = fl.sweep_network(config, over, rounds=rounds)
    wall_s = time.perf_counter() - started
    latency_s = np.asarray(found.rounds.latency_s, np.float64).mean(-1)
    return {
        "settings": len(found.settings),
        "wall_s": wall_s,
        "settings_a_minute": 60 * len(found.settings) / wall_s,
        "rows": [
            {**setting, "latency_s": float(mean), "kept_ranks": float(np.mean(kept)), "heard": float(np.mean(heard))}
            for setting, mean, kept, heard in zip(
                found.settings, latency_s, found.rounds.kept_ranks, found.rounds.heard, strict=True
            )
        ],
    }


def main() -> None:
    """Measure both controllers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--powers", type=int, default=8, help="of the transmit powers (%(default)s)")
    options = parser.parse_args()
    fl.use_cpu_cores()
    result: dict[str, Any] = {"clients": options.clients, "rounds": options.rounds}
    for name, overrides in CONTROLS.items():
        result[name] = measure(overrides, options.clients, options.rounds, options.powers)
        common.note(f"{name}: {result[name]['settings_a_minute']:.1f} settings a minute")
    result["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    common.emit(result | {"environment": common.environment()}, options.out)


if __name__ == "__main__":
    main()
