"""Sweeps from Python: many settings of one configuration, in as few programs as there are structures."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from fedjax_lora.app.halving import Halving, Point
from fedjax_lora.app.trials import Begun, announce, became, play
from fedjax_lora.config.catalogue import Catalogue, check_needs
from fedjax_lora.config.experiment import ExperimentConfig, load_config
from fedjax_lora.config.groups import Group, grouped
from fedjax_lora.config.sweeps import Setting, grid, overrides
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.methods import Method
from fedjax_lora.core.progress import Progress
from fedjax_lora.core.types import FedState, Metrics
from fedjax_lora.io.log import metrics_lines
from fedjax_lora.sim.alone import NetworkRounds, run_alone
from fedjax_lora.sim.trials import lane_of

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingImports]  # of the user's own


@dataclasses.dataclass(frozen=True)
class Trials:
    """What the trials of a sweep came to.

    settings: of each, dotted key -> value, of the keys that were swept.
    metrics: with leaves `[trials, rounds, ...]`. Beyond the last round of a trial, and where only others have a value
      (a larger cohort, a metric of another method), numbers are NaN and counts 0.
    rounds: `[trials]` that each has had.
    status: of each, `ended`, `stopped` by halving or `diverged`.

    Example:
      >>> trials = fl.sweep(config, over={"seed": [0, 1], "control.keep_ratio": [0.25, 0.5]})  # doctest: +SKIP
      >>> trials.metrics.eval_accuracy[:, -1].shape  # doctest: +SKIP
      (4,)
      >>> trials.mean("eval_accuracy")  # over the seeds, one row for each keep ratio  # doctest: +SKIP
    """

    settings: list[Setting]
    metrics: Metrics
    rounds: np.ndarray
    status: list[str]

    def __len__(self) -> int:
        return len(self.settings)

    def last(self, name: str) -> np.ndarray:
        """`[trials]` values of a metric in the last round of each trial."""
        values = np.asarray(getattr(self.metrics, name))
        return values[np.arange(len(self)), self.rounds - 1]

    def mean(self, name: str, over: str = "seed") -> list[dict[str, Any]]:
        """Mean and standard deviation over one key of a metric in the last round, a row for each setting of the rest.

        Of the trials that have ended: not of those that were stopped, or diverged.

        Args:
          name: of the metric, an attribute of `Metrics`.
          over: key whose values are put together.

        Returns:
          Rows with the other keys, `mean`, `deviation` (of the sample; NaN of a single trial) and `trials`.
        """
        found: dict[str, tuple[Setting, list[float]]] = {}
        for setting, value, status in zip(self.settings, self.last(name), self.status, strict=True):
            if status != "ended":
                continue
            rest = {key: given for key, given in setting.items() if key != over}
            found.setdefault(repr(rest), (rest, []))[1].append(float(value))
        return [
            {
                **rest,
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                "trials": len(values),
            }
            for rest, values in found.values()
        ]

    def numpy(self) -> dict[str, np.ndarray]:
        """One row for each round of each trial: swept keys, and the fields of `metrics.jsonl` that are numbers.

        Columns of what is no number, such as words and lists, are of objects.
        """
        rows = self._rows()
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _column([row.get(name, math.nan) for row in rows]) for name in names}

    def to_pandas(self) -> "pd.DataFrame":
        """`numpy` as a data frame; pandas must be installed."""
        import pandas as pd  # pyright: ignore[reportMissingImports]  # of the user's own

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for trial, setting in enumerate(self.settings):
            own = jax.tree.map(lambda leaf, trial=trial: leaf[trial, : self.rounds[trial]], self.metrics)
            for line in metrics_lines(own):
                numbers = {k: math.nan if v is None else v for k, v in line.items() if not isinstance(v, list)}
                rows.append({"trial": trial, **setting, **numbers})
        return rows


def sweep(
    config: ExperimentConfig,
    over: Mapping[str, Sequence[Any]] | Sequence[Setting],
    methods: Sequence[Method] = (),
    *,
    halving: str | None = None,
    progress: bool = False,
) -> Trials:
    """Run many settings of a configuration; those of equal structure side by side in one program.

    Args:
      config: what the settings are laid over.
      over: key -> values, for every combination (the last varies fastest); or a list of settings, key -> value.
      methods: a user's own, beside the package's.
      halving: `METRIC` or `METRIC:COST`, stops the worse half of the trials after 1, 2, 4, ... evaluations; see
        `app.halving`. None runs all to their end.
      progress: whether to show how far they are.

    Raises:
      ConfigError: a setting is refused: one line.
    """
    settings, groups = _settings_and_groups(config, over, methods)
    keeper = _InMemory(len(settings))
    console = Console(highlight=False, quiet=not progress)
    announce(console, groups, len(settings))
    with Progress(console) as shown:
        stopped = play(groups, keeper, shown, halving=Halving.parse(halving) if halving else None)
    runs = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts) for parts in keeper.metrics]
    last = [list(metrics_lines(parts[-1]))[-1] for parts in keeper.metrics]
    status = [became(line, place in stopped) for place, line in enumerate(last)]
    return Trials(settings, together(runs), np.array([len(run.round) for run in runs]), status)


def _column(values: list[Any]) -> np.ndarray:
    """An array of numbers, or of objects where some are none."""
    if all(isinstance(value, int | float) for value in values):
        return np.array(values)
    found = np.empty(len(values), object)
    found[:] = values
    return found


class NetworkTrials(NamedTuple):
    """What the trials of a network came to.

    settings: of each, dotted key -> value. rounds: leaves `[trials, rounds]`.
    """

    settings: list[Setting]
    rounds: NetworkRounds


def sweep_network(
    config: ExperimentConfig,
    over: Mapping[str, Sequence[Any]] | Sequence[Setting],
    rounds: int,
    methods: Sequence[Method] = (),
) -> NetworkTrials:
    """Play the network and the controller of many settings without training, see `sim.alone`.

    Args:
      config, over, methods: as of `sweep`.
      rounds: of each.

    Raises:
      ConfigError: a setting is refused: one line.

    Example:
      >>> network = fl.sweep_network(config, over={"wireless.power_dbm": [10, 23]}, rounds=1000)  # doctest: +SKIP
      >>> network.rounds.latency_s.mean(-1)  # doctest: +SKIP
    """
    settings, groups = _settings_and_groups(config, over, methods)
    for group in groups:
        own, simulation = group.configs[0], group.simulation
        check_needs(own, Catalogue.of(methods), {"whole_at_client", "in_step"}, "a network without training")
        if simulation.make_parts(simulation.numbers).controller.schedule is not None:
            raise ConfigError(
                "control.name must be of a controller that does not choose the cohort, for a network without training, "
                f"got {own.control.name!r}"
            )
    found: dict[int, NetworkRounds] = {}
    for group in groups:
        own = run_alone(group.simulation, group.trials, rounds)
        found |= {place: lane_of(own, number) for number, place in enumerate(group.places)}
    reports = {name: np.full(rounds, np.nan, np.float32) for one in found.values() for name in one.report}
    rows = [found[place]._replace(report=reports | found[place].report) for place in range(len(settings))]
    return NetworkTrials(settings, jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


def _settings_and_groups(
    config: ExperimentConfig, over: Mapping[str, Sequence[Any]] | Sequence[Setting], methods: Sequence[Method]
) -> tuple[list[Setting], list[Group]]:
    settings = grid(over) if isinstance(over, Mapping) else [dict(setting) for setting in over]
    configs = [load_config(None, overrides(setting), base=config, methods=methods) for setting in settings]
    groups, refused = grouped(configs, methods)
    if refused:
        raise next(iter(refused.values()))
    return settings, groups


class _InMemory:
    """Keeps the metrics of each trial's segments."""

    def __init__(self, trials: int):
        self.metrics: list[list[Metrics]] = [[] for _ in range(trials)]

    def begin(self, place: int, begun: Begun) -> None:
        del place, begun

    def keep(self, place: int, state: FedState, metrics: Metrics) -> None:
        del state
        self.metrics[place].append(metrics)

    def kept(self) -> None:
        pass

    def points(self, place: int, halving: Halving, rung: int) -> list[Point]:
        return halving.points([line for part in self.metrics[place] for line in metrics_lines(part)], rung)


def together(runs: Sequence[Metrics]) -> Metrics:
    """Metrics `[rounds, ...]` of runs as one `[runs, rounds, ...]`, see `Trials`."""
    absent = {name: np.full(1, np.nan, np.float32) for run in runs for name in run.methods}
    rows = [dataclasses.replace(run, methods=absent | run.methods) for run in runs]

    def padded(*leaves: np.ndarray) -> np.ndarray:
        shape = np.max([leaf.shape for leaf in leaves], axis=0)
        fill = np.nan if np.issubdtype(leaves[0].dtype, np.floating) else 0
        ends = [[(0, whole - own) for whole, own in zip(shape, leaf.shape, strict=True)] for leaf in leaves]
        return np.stack([np.pad(leaf, end, constant_values=fill) for leaf, end in zip(leaves, ends, strict=True)])

    return jax.tree.map(padded, *rows)
