"""A plan as a table for a terminal and as a picture."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich import box
from rich.table import Table

from fedjax_lora.io.plan import Plan
from fedjax_lora.planning.bound import BoundTerms, Effects
from fedjax_lora.report.formats import MISSING, bits, count, number

_COLUMNS = {
    "rank": ("rank", count),
    "keep_ratio": ("keep ratio", number),
    "latency_s": ("latency, s", number),
    "uplink_bits": ("uplink of a client", bits),
    "V": ("V", number),
    "queue_s": ("first queue, s", number),
    "descent": ("descent", number),
    "noise": ("noise", number),
    "rank_cost": ("of both, rank", number),
    "sparsification": ("sparsification", number),
    "covariance": ("covariance", number),
    "bound": ("bound", number),
}
_COLORS = ("#3b82f6", "#06b6d4", "#f59e0b", "#ef4444")


def plan_table(plan: Plan) -> Table:
    """Rank by what to expect of it; the chosen one is marked, and so is a latency over the budget."""
    table = Table(box=box.SIMPLE_HEAD)
    for label, _ in _COLUMNS.values():
        table.add_column(label, justify="right")
    if plan.objective == "rollout":
        table.add_column("loss of rollout", justify="right")
        table.add_column("over the best ± s.e.", justify="right")
    table.add_column("")
    for row in plan.rows:
        cells = [MISSING if row[key] is None else form(row[key]).text for key, (_, form) in _COLUMNS.items()]
        if plan.objective == "rollout":
            score, mean, error = (
                MISSING if x is None else f"{x:.4f}" for x in (row["score"], row["excess"], row["excess_error"])
            )
            cells += [score, mean if error == MISSING else f"{mean} ± {error}"]
        notes = (["chosen"] if row["rank"] == plan.rank else []) + ([] if row["within_budget"] else ["over budget"])
        table.add_row(*cells, ", ".join(notes))
    return table


def choice(plan: Plan) -> str:
    """What a run takes of it, in one line."""
    return f"rank {plan.rank}, V {plan.V:.6g}, first queue {plan.queue_s:.6g} s"


def binding(found: Effects) -> str:
    """One line: what training itself leaves of the bound, what each of the three effects adds, and which binds.

    None does where one is not known, as in a pilot that diverged.
    """
    parts = {name: float(value) for name, value in found._asdict().items()}
    three = [name for name in parts if name != "training"]
    listed = ", ".join(f"{name} {number(value).text}" for name, value in parts.items())
    known = not any(math.isnan(parts[name]) for name in three)
    return f"bound: {listed}; binding: {max(three, key=lambda name: parts[name]) if known else 'not known'}"


def plot_plan(plan: Plan, path: Path) -> None:
    """Bars of the bound's terms by rank over latency and bits, as an image; written in full or not at all."""
    rows: list[dict[str, Any]] = plan.rows
    ranks = [row["rank"] for row in rows]
    labels = [str(rank) for rank in ranks]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bottom = [0.0] * len(rows)
    for name, color in zip(BoundTerms._fields, _COLORS, strict=True):
        heights = [row[name] or 0.0 for row in rows]
        left.bar(labels, heights, bottom=bottom, color=color, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    left.set(title=f"bound; chosen: rank {plan.rank}", xlabel="structural rank")
    left.legend(fontsize="small")
    if plan.objective == "rollout":
        means = [math.nan if row["excess"] is None else row["excess"] for row in rows]
        errors = [row["excess_error"] or 0.0 for row in rows]
        right.errorbar(ranks, means, errors, marker="o", capsize=3, color=_COLORS[0])
        right.set(title="loss after the rollout, over the best", xlabel="structural rank")
    else:
        right.plot(ranks, [row["latency_s"] for row in rows], marker="o", color=_COLORS[0])
        right.axhline(plan.config["control.latency_budget_s"], linestyle="--", color=_COLORS[3], label="budget")
        right.set(title="mean latency of a round, s", xlabel="structural rank")
        right.legend(frameon=False)
    right.set_xscale("log", base=2)
    right.set_xticks(ranks)
    right.xaxis.set_major_formatter(ScalarFormatter())
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(path)
