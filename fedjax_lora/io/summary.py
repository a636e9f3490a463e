"""What the log of a run comes to: its totals, and what went wrong in it, one line each."""

from collections.abc import Mapping, Sequence
from typing import Any

OF_TASK = "task/"
"""What the fields begin with that a task measures beside loss and accuracy; a summary has those of the last round."""

_SLACK = 1.01
"""How far above its budget a mean latency still counts as within: whole ranks leave no finer choice."""

_DIVERGED = (
    "the training of every client diverged; local.optimizer.learning_rate is probably too high, "
    "or the examples are not of the kind that the model was trained on"
)
_UNHEARD = (
    "no upload arrived; more of wireless.power_dbm or wireless.bandwidth_hz, a lower wireless.fade_threshold "
    "or fewer bits a client may help"
)


def summarize(metrics: list[dict[str, Any]], latency_budget_s: float | None = None) -> dict[str, Any]:
    """The part of a summary that the lines of `metrics.jsonl` tell, under a budget of a round's mean latency."""
    accuracies, personal = (
        [line[field] for line in metrics if line[field] is not None] for field in ("eval_accuracy", "personal_accuracy")
    )
    total_s = metrics[-1]["cumulative_latency_s"] if metrics else None
    mean_s = None if total_s is None else total_s / len(metrics)
    return {
        "final_loss": metrics[-1]["eval_loss"] if metrics else None,
        "final_accuracy": metrics[-1]["eval_accuracy"] if metrics else None,
        "best_accuracy": max(accuracies, default=None),
        "personal_accuracy": personal[-1] if personal else None,
        "total_uplink_bits": sum(line["uplink_bits"] for line in metrics),
        "total_downlink_bits": sum(line["downlink_bits"] for line in metrics),
        "total_latency_s": total_s,
        "mean_latency_s": mean_s,
        "latency_over_budget": None if mean_s is None or latency_budget_s is None else mean_s / latency_budget_s,
        "final_queue_s": metrics[-1]["queue_s"] if metrics else None,
        "rounds": len(metrics),
        "lost_rounds": sum(line["participants"] == 0 for line in metrics),
        "diverged_rounds": sum(line["nonfinite_clients"] > 0 for line in metrics),
        **{name: value for name, value in (metrics[-1] if metrics else {}).items() if name.startswith(OF_TASK)},
    }


def troubles(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """What a user should know of a run that has ended; `summary` has what `summarize` gives and `latency_budget_s`."""
    return [line for line in (nothing_learned(lines), not_finite(lines), budget_missed(summary)) if line]


def nothing_learned(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """In how many of these rounds no client's update arrived, and the likely cause; None where it is none of them."""
    lost = [line for line in lines if line["participants"] == 0]
    if not lost:
        return None
    diverged, unheard = (sum(line[what] for line in lost) for what in ("nonfinite_clients", "outages"))
    cause = _DIVERGED if diverged >= unheard else _UNHEARD
    return f"nothing was learned in {len(lost)} of {len(lines)} rounds, first in round {lost[0]['round']}: {cause}"


def not_finite(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether the model at the end, which is always evaluated, gives no finite loss."""
    if not lines or lines[-1]["eval_loss"] is not None:
        return None
    return (
        f"the model of round {lines[-1]['round']} gives no finite loss on the held-out examples; "
        "server.learning_rate or local.optimizer.learning_rate is probably too high"
    )


def budget_missed(summary: Mapping[str, Any]) -> str | None:
    """By how much the mean latency of a round is above the run's budget; None where it is not, or there is none."""
    over = summary["latency_over_budget"]
    if over is None or over <= _SLACK:
        return None
    return (
        f"the latency budget was missed: a round took {summary['mean_latency_s']:.4g} s on average, "
        f"{over:.4g} times control.latency_budget_s = {summary['latency_budget_s']:.4g}; "
        f"the queue ended at {summary['final_queue_s']:.4g} s"
    )
