"""A plan on disk, `plan.json`: the structural rank, V and first queue that the offline stage chose, and what for."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, to_dict
from fedjax_lora.control.tsfa_online import TsfaConfig
from fedjax_lora.io.files import write_atomically
from fedjax_lora.io.run_files import flatten
from fedjax_lora.planning import bound

NAME = "plan.json"

_FREE = ("lora.rank", "control.V", "control.queue_s", "plan.", "engine.")


class Plan(NamedTuple):
    """What the offline stage found.

    config: the configuration with dotted keys, without what a plan sets or does not depend on.
    objective, search: of `PlanConfig`.
    rank, V, queue_s: chosen, the last as the queue before round 1. within_budget: whether they meet the latency budget.
    factors: of the learning rate in each round, see `bound.terms`.
    rows: one dict a candidate rank: `rank, V, queue_s, keep_ratio, kept_ranks, latency_s, uplink_bits, final_queue_s`,
      each term of the bound, `rank_cost` (the effect of the rank on it), `bound`, `score`, of a rollout `losses` (one a
      seed; their mean is the score), `excess` and `excess_error` (see `rank_search.Excess`), `accuracy` and
      `rollout_latency_s`, and what the pilot measured.
    """

    config: dict[str, Any]
    objective: str
    search: str
    rank: int
    V: float
    queue_s: float
    within_budget: bool
    factors: list[float]
    rows: list[dict[str, Any]]

    @property
    def chosen(self) -> dict[str, Any]:
        """The row of the chosen rank."""
        return next(row for row in self.rows if row["rank"] == self.rank)

    @property
    def taken(self) -> dict[str, Any]:
        """What a run takes of it."""
        return {"rank": self.rank, "V": self.V, "queue_s": self.queue_s}


def write_plan(plan: Plan, path: Path) -> None:
    """Write it as JSON, in full or not at all."""
    write_atomically(path, json.dumps(plan._asdict(), indent=2, allow_nan=False) + "\n")


def read_plan(path: str | Path) -> Plan:
    """The plan of a file.

    Raises:
      ConfigError: it is not one, or is damaged; one line.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = Plan(**found)
        if type(plan.rank) is not int or not isinstance(plan.config, dict):
            raise ValueError(f"rank {plan.rank!r} and config {plan.config!r}")
        if not (0 < plan.V < math.inf and 0 <= plan.queue_s < math.inf):
            raise ValueError(f"V {plan.V!r} and queue_s {plan.queue_s!r}")
        _measured(plan)
        factors = np.array(plan.factors, float)
        if factors.shape != (plan.config["rounds"],) or not ((factors >= 0) & (factors < 1.001)).all():
            raise ValueError(f"factors {plan.factors!r}, which are not one in [0, 1] for each round")
    except OSError as error:
        raise ConfigError(f"plan {path} must be a readable file, got {error.strerror}") from error
    except (ValueError, TypeError, KeyError, StopIteration, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ConfigError(f"plan {path} must be what `fedjax-lora plan` wrote, got {reason}") from error
    return plan


def apply_plan(plan: Plan, config: ExperimentConfig, path: str | Path) -> ExperimentConfig:
    """The configuration with the plan's rank, V and first queue.

    Raises:
      ConfigError: the plan was made for another configuration; names the first key that differs.
    """
    own, planned = _planned_for(config), plan.config
    for key in dict.fromkeys([*own, *planned]):
        if own.get(key) != planned.get(key):
            raise ConfigError(
                f"plan {path} must be one for this configuration, with {key} = {own.get(key)!r}, "
                f"got one with {planned.get(key)!r}"
            )
    assert isinstance(config.control, TsfaConfig)  # else the name would have differed
    control = dataclasses.replace(config.control, V=plan.V, queue_s=plan.queue_s)
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=plan.rank), control=control)


def effects_of_plan(plan: Plan) -> bound.Effects:
    """The bound at the chosen rank, as planned, by cause."""
    names = bound.BoundTerms._fields
    terms = bound.BoundTerms(*(jnp.float32(math.inf if plan.chosen[n] is None else plan.chosen[n]) for n in names))
    return bound.effects(_measured(plan), terms)


def effects_of_run(plan: Plan, lines: list[dict[str, Any]]) -> bound.Effects:
    """The bound with the errors that a run logged, by what the plan's pilot measured at its rank."""
    sparsification, covariance = (
        np.array([math.nan if line[name] is None else line[name] for line in lines])
        for name in ("sparsification_error", "covariance_error")
    )
    measured = _measured(plan)
    return bound.effects(measured, bound.of_log(measured, sparsification, covariance, np.array(plan.factors)))


def _measured(plan: Plan) -> bound.Measured:
    """What the pilot measured at the plan's rank; NaN where the file has null, as for all that is not finite."""
    values = (plan.chosen[name] for name in bound.Measured._fields)
    return bound.Measured(*(jnp.float32(math.nan if value is None else float(value)) for value in values))


def _planned_for(config: ExperimentConfig) -> dict[str, Any]:
    """What a plan depends on, as JSON gives it back."""
    flat = flatten(to_dict(config))
    return json.loads(json.dumps({key: value for key, value in flat.items() if not key.startswith(_FREE)}))


def described(
    config: ExperimentConfig,
    chosen: int,
    most_latency_s: float,
    factors: Any,
    forecast: Any,
    measured: Any,
    rollout: Any,
    excess: Any,
) -> Plan:
    """The plan from arrays on the host: factors `[T]`; by candidate a `Forecast` and a `Measured`.

    By rollout, a `Rollout` and an `Excess` too, else None.
    """
    rows, effects = [], bound.effects(measured, forecast.terms)
    for i, rank in enumerate(forecast.rank):
        row: dict[str, Any] = {"rank": int(rank)}
        row |= {name: float(getattr(forecast, name)[i]) for name in _EXPECTED}
        row |= {name: float(term[i]) for name, term in forecast.terms._asdict().items()}
        row |= {"rank_cost": float(effects.rank[i])}
        row |= {"bound": float(forecast.score[i]), "score": float(forecast.score[i])}
        if rollout is not None:
            row["losses"] = [_finite(loss) for loss in rollout.loss[i].tolist()]
            row["score"] = float(rollout.loss[i].mean())
            row |= {"excess": float(excess.mean[i]), "excess_error": float(excess.error[i])}
            row["accuracy"] = float(rollout.accuracy[i].mean())
            row["rollout_latency_s"] = float(rollout.latency_s[i].mean())
        row |= {name: float(value[i]) for name, value in measured._asdict().items()}
        row["within_budget"] = row["latency_s"] <= most_latency_s
        rows.append({key: _finite(value) for key, value in row.items()})
    best = rows[chosen]
    return Plan(
        config=_planned_for(config),
        objective=config.plan.objective,
        search=config.plan.search,
        rank=best["rank"],
        V=best["V"],
        queue_s=best["queue_s"],
        within_budget=best["within_budget"],
        factors=factors.tolist(),
        rows=rows,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_EXPECTED = ("V", "queue_s", "keep_ratio", "kept_ranks", "latency_s", "uplink_bits", "final_queue_s")
