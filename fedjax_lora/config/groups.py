"""Configurations of one structure: built once, with the numbers, seed and partition of each."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.config import host_pool
from fedjax_lora.config.assemble import build, filled, without_draws
from fedjax_lora.config.catalogue import Catalogue, notes
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core.errors import ConfigWarning
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import split
from fedjax_lora.data.batches import padded_index
from fedjax_lora.data.partition import Partition, partition
from fedjax_lora.sim.engine import Facts, Simulation
from fedjax_lora.sim.trials import Trial


class Group(NamedTuple):
    """Configurations that one program serves.

    simulation: of the first of them. places: where they stand among all.
    configs, trials, facts: of each.
    """

    simulation: Simulation
    places: list[int]
    configs: list[ExperimentConfig]
    trials: list[Trial]
    facts: list[Facts]


def grouped(
    configs: Sequence[ExperimentConfig], methods: Sequence[Method] = ()
) -> tuple[list[Group], dict[int, ValueError | OSError]]:
    """The configurations by structure, in the order of their first ones.

    Warns with a ConfigWarning where options are known to degenerate, once for each such line.

    Args:
      configs: as `load_config` gives them.
      methods: a user's own, beside the package's.

    Returns:
      The groups, and place -> error of the configurations that cannot be built.
    """
    catalogue = Catalogue.of(methods)
    groups: list[Group] = []
    refused: dict[int, ValueError | OSError] = {}
    for places in by_structure(configs):
        found, errors = _built(places, [configs[place] for place in places], methods)
        groups, refused = groups + found, refused | errors
    for note in dict.fromkeys(
        note for group in groups for config in group.configs for note in notes(config, catalogue)
    ):
        warnings.warn(note, ConfigWarning, stacklevel=2)
    return sorted(groups, key=lambda group: group.places[0]), refused


def by_structure(configs: Sequence[ExperimentConfig]) -> list[list[int]]:
    """The places of configurations of one structure, in the order of their first ones; nothing is built."""
    return list(_by(range(len(configs)), lambda place: _structure(configs[place])).values())


def _structure(config: ExperimentConfig) -> Hashable:
    """What decides about a program: not the seed, nor how it partitions the examples."""
    return split(without_draws(config))[0]


def _built(
    places: Sequence[int], configs: Sequence[ExperimentConfig], methods: Sequence[Method]
) -> tuple[list[Group], dict[int, ValueError | OSError]]:
    """Configurations of one structure: one group, or more where the largest client leaves places in a batch empty.

    Who has a partition that cannot be drawn is refused alone.
    """
    refused: dict[int, ValueError | OSError] = {}
    simulation, first = None, 0
    for first, config in enumerate(configs):
        try:
            host_pool.check_sweep(config)
            simulation = build(config, methods)
            break
        except (ValueError, OSError) as error:
            refused[places[first]] = error
    if simulation is None:
        return [], refused
    labels, holders = simulation.facts.labels, simulation.facts.holders
    assert labels is not None  # it is built of examples
    partitions, undrawn = _partitions(configs, labels, holders)
    refused |= {places[i]: error for i, error in undrawn.items()}
    width = max(len(padded_index(drawn)[0]) for drawn in partitions.values())
    groups = []
    for own in _by(partitions, lambda i: filled(configs[i].local, partitions[i]).batch_size).values():
        of_these = simulation if first in own else build(configs[own[0]], methods)
        groups.append(
            Group(
                simulation=of_these,
                places=[places[i] for i in own],
                configs=[configs[i] for i in own],
                trials=[_trial(configs[i], partitions[i], width) for i in own],
                facts=[of_these.facts._replace(partition_hash=partitions[i].hash) for i in own],
            )
        )
    return groups, refused


def _trial(config: ExperimentConfig, drawn: Partition, width: int) -> Trial:
    index = jax.tree.map(jnp.asarray, padded_index(drawn, width))
    return Trial(split(config)[1], config.seed, index, jnp.asarray(drawn.count))


def _partitions(
    configs: Sequence[ExperimentConfig], labels: np.ndarray, holders: np.ndarray | None
) -> tuple[dict[int, Partition], dict[int, ValueError]]:
    """Number of a configuration -> its partition, drawn once for those that have the same, or why there is none."""
    drawn: dict[Hashable, Partition | ValueError] = {}
    for config in configs:
        asked = (config.clients.partition, config.seed)
        if asked not in drawn:
            try:
                how, count = config.clients.partition, config.clients.count
                drawn[asked] = partition(how, labels, count, config.seed, holders)
            except ValueError as error:
                drawn[asked] = error
    found = {i: drawn[config.clients.partition, config.seed] for i, config in enumerate(configs)}
    return (
        {i: one for i, one in found.items() if not isinstance(one, ValueError)},
        {i: one for i, one in found.items() if isinstance(one, ValueError)},
    )


def _by(items: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    """The items by their keys, in the order of the first of each."""
    found: dict[Hashable, list[int]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
