"""How the work of a round is laid out over devices, clients and batches, by the options of an experiment."""

from collections.abc import Mapping
from typing import Any

from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.exchange import Aggregator
from fedjax_lora.core.learning import Model
from fedjax_lora.core.mapping import Mapped
from fedjax_lora.core.methods import Context
from fedjax_lora.data import sources
from fedjax_lora.data.batches import evaluation_batches
from fedjax_lora.data.packing import packing_of
from fedjax_lora.sim.cohort import device_mesh
from fedjax_lora.sim.parts import Layout


def layout_of(config: ExperimentConfig, context: Context, made: Mapping[str, Any], model: Model) -> Layout:
    """The layout with one client at once on each device, and nothing packed.

    made: slot -> record, of the experiment.

    Raises:
      ConfigError: updates shall be added one by one where that is not possible.
    """
    takes, at_once = made["arrival"].takes, context.cohort_size
    together = takes is None
    if not config.engine.error_norms:
        _check_one_by_one(config, made["aggregation"], together)
    return Layout(
        cohort_size=at_once if together else takes,
        chunk=1,
        mesh=device_mesh(model=config.engine.model_devices),
        everyone=at_once == context.num_clients and together and made["control"].schedule is None,
        one_rank=not config.lora.client_ranks and made["aggregation"].next_rank is None,
        in_order=config.engine.reproducible,
        all_at_once=config.engine.error_norms,
        running=None if together else at_once,
        axes=Mapped(model.axes),
    )


def _check_one_by_one(config: ExperimentConfig, aggregator: Aggregator, together: bool) -> None:
    """Refuse to add one update after the other where the aggregator has no fold, or clients do not end `together`."""
    if aggregator.fold is None:
        name = getattr(config.aggregation, "name", None)
        raise ConfigError(f"engine.error_norms must be true where aggregation.name is {name}, got False")
    if not together:
        name = getattr(config.arrival, "name", None)
        raise ConfigError(f"engine.error_norms must be true where arrival.name is {name}, got False")


def packed(
    config: ExperimentConfig, context: Context, layout: Layout, examples: sources.Examples
) -> tuple[Context, Layout]:
    """Context and layout with the shapes of packed batches, of training and of evaluation."""
    train, test = (pool["attention_mask"] for pool in (examples.train, examples.test))
    devices = 1 if layout.in_order else layout.num_devices
    batches, _ = evaluation_batches(len(test), config.engine.eval_batch_size, devices)
    packing = packing_of(train, config.local.batch_size, together=layout.chunk)
    return context._replace(packing=packing), layout._replace(packing=packing_of(test, batches.shape[1]))
