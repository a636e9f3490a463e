"""Draws throughput against kept energy at equal bits, from the JSON of `sparsifier_throughput.py`.

Run as `python benchmarks/sparsifier_figure.py RESULT.json PICTURE.svg`. A filled circle is one of this project's
sparsifiers, an open one the SVD as PyTorch computes it, which keeps the same energy.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

OWN, PEER = "#3b82f6", "#f97316"


def points(result: dict) -> list[tuple[str, float, float, str]]:
    """Name, clients a second, kept energy and side, at the size of `shown`."""
    row, energy = shown(result), result["energy"]["methods"]
    found = [(n, row["methods"][n]["clients_per_s"], of["kept_energy"], "own") for n, of in energy.items()]
    if "svd" in energy:
        kept = energy["svd"]["kept_energy"]
        peers = ((name, each) for name, each in row["torch"].items() if "SVD" in name)
        found += [(f"PyTorch, {name}", each["clients_per_s"], kept, "peer") for name, each in peers]
    return found


def shown(result: dict) -> dict:
    """The row of the most clients at rank 16 and width 768, or else the last."""
    rows = [row for row in result["rows"] if (row["rank"], row["width"]) == (16, 768)]
    return max(rows, key=lambda row: row["clients"]) if rows else result["rows"][-1]


def main() -> None:
    """Read the result, and write the picture in the format of its name."""
    source, target = map(Path, sys.argv[1:])
    result = json.loads(source.read_text())
    row = shown(result)
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    every = points(result)
    for name, rate, kept, side in every:
        filled = side == "own"
        colour = OWN if filled else PEER
        axes.plot(rate, kept, "o", color=colour, markerfacecolor=colour if filled else "white", markersize=7)
        crowded = any(rate < x < 10 * rate and abs(y - kept) < 0.03 for other, x, y, _ in every if other != name)
        shift, align = ((-6, 5), "right") if crowded else ((6, 5), "left")
        shift, align = (shift, align) if filled else ((0, -14), "center")
        axes.annotate(name, (rate, kept), xytext=shift, textcoords="offset points", ha=align, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel(f"clients a second ({row['clients']} clients, rank {row['rank']}, width {row['width']})")
    axes.set_ylabel("share of the changes' energy that arrives\nfor no more bits than soft takes")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


if __name__ == "__main__":
    main()
