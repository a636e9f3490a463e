"""Draws both systems in the cells that were measured, from the JSON of `split_systems.py`.

Run as `python benchmarks/systems_figure.py RESULTS.json PICTURE.png`. Accuracy over simulated seconds, over bits that
crossed the air, and over FLOP of the devices; a circle is where the mean over the seeds first reaches the target.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"whole": "#334155", "whole, soft + tsfa": "#3b82f6", "split int8": "#f97316", "split float32": "#dc2626"}
AXES = {"elapsed_s": "simulated time, s", "bits": "bits up and down, Mbit", "device_flop": "FLOP of all devices, 10^12"}
UNITS = {"elapsed_s": 1.0, "bits": 1e6, "device_flop": 1e12}


def main() -> None:
    """Read the results, and write the picture."""
    source, target = map(Path, sys.argv[1:])
    held = json.loads(source.read_text())
    runs = held["systems"]["runs"]
    cells = list(dict.fromkeys(", ".join(title.rsplit(", seed ", 1)[0].rsplit(", ", 2)[-2:]) for title in runs))
    figure = Figure(figsize=(11.5, 3.2 * len(cells)), dpi=100, layout="constrained")
    panels = figure.subplots(len(cells), len(AXES), sharey=True, squeeze=False)
    for row, cell in zip(panels, cells, strict=True):
        for name, colour in COLOURS.items():
            mine = [run["rows"] for title, run in runs.items() if title.startswith(f"{name}, {cell}, seed ")]
            if mine:
                _curve(row, name, colour, mine, held["made_with"]["target"])
        row[0].set_ylabel(f"test accuracy\n{cell}")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(target)


def _curve(row: np.ndarray, name: str, colour: str, seeds: list[list[dict]], target: float) -> None:
    """One system's means over its seeds, on each axis."""
    accuracy = np.array([[point["accuracy"] for point in rows] for rows in seeds])
    for axes, (key, label) in zip(row, AXES.items(), strict=True):
        x = np.array([[_value(point, key) / UNITS[key] for point in rows] for rows in seeds]).mean(0)
        mean = accuracy.mean(0)
        axes.plot(x, mean, color=colour, label=name)
        axes.fill_between(x, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.15, linewidth=0)
        if (reached := np.flatnonzero(mean >= target)).size:
            axes.plot(x[reached[0]], mean[reached[0]], "o", color=colour)
        axes.set_xlabel(label)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


def _value(point: dict, key: str) -> float:
    return point["uplink_bits"] + point["downlink_bits"] if key == "bits" else point[key]


if __name__ == "__main__":
    main()
