"""Draws the README's picture from the folder of a run: `python docs/picture.py runs/digits`."""

import sys
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from fedjax_lora.report.runs import load_runs


def main() -> None:
    """Accuracy by round, simulated seconds and uplink bits, beside each other."""
    (run,) = load_runs(sys.argv[1:])
    uplink_mbit = accumulate(line["uplink_bits"] / 1e6 for line in run.metrics)
    points = [(0.0, 0.0, 0.0, run.summary["initial_accuracy"])]
    for line, mbit in zip(run.metrics, uplink_mbit, strict=True):
        if line["eval_accuracy"] is not None:
            points.append((line["round"], line["cumulative_latency_s"], mbit, line["eval_accuracy"]))
    *columns, accuracy = zip(*points, strict=True)

    figure = Figure(figsize=(11.5, 3.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = ("round", "simulated time, s", "uplink so far, Mbit")
    for axes, x, label in zip(panels, columns, labels, strict=True):
        axes.plot(x, accuracy, "o-", color="#3b82f6", markersize=5)
        axes.set_xlabel(label)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy")
    figure.savefig(Path(__file__).with_name("report.png"))


if __name__ == "__main__":
    main()
