"""The examples that a configuration names, and what a log says of them."""

from typing import Any

from fedjax_lora.config.beginning import Begin, hash_weights
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core.learning import Learned
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Base
from fedjax_lora.data import sources
from fedjax_lora.data.partition import Partition
from fedjax_lora.models import layers, load
from fedjax_lora.sim.engine import Facts


def read_examples(config: ExperimentConfig, catalogue: Catalogue) -> sources.Examples:
    """The examples that the configuration names."""
    data: Any = config.data
    source: sources.Source = catalogue.find("data", data.source).make(data, Context(0, 0))
    pretrained = getattr(config.model, "pretrained", None)
    learns: Learned = getattr(config.task, "learns", "label")
    if pretrained is None:
        return source.load(None, "", learns)
    shape = load.read_shape(pretrained)
    if source.tokenizes:
        load.check_inputs(shape, pretrained, None)
        layers.check_length(shape.max_positions, data.max_length)
        examples = source.load(load.load_tokenizer(pretrained), pretrained, learns)
    else:
        examples = source.load(None, "", learns)
    if "input_ids" in examples.train and shape.image_shape is None:
        ids = ("input_ids", "target") if learns == "next_token" else ("input_ids",)
        load.check_ids(shape, *(pool[name] for pool in (examples.train, examples.test) for name in ids))
    return examples


def facts_of(
    config: ExperimentConfig, examples: sources.Examples, split_data: Partition, base: Base, begin: Begin
) -> Facts:
    """What a run of these examples and weights is of."""
    return Facts(
        base_hash=hash_weights(base, begin.head),
        initial_hash=begin.hash_given(),
        examples_hash=examples.fingerprint,
        partition_hash=split_data.hash,
        tokenizer_hash=examples.tokenizer_hash,
        model_config_hash=load.model_config_hash(config.model) if isinstance(config.model, load.ModelConfig) else "",
        class_names=examples.class_names,
        truncated=examples.truncated,
        notes=examples.notes,
        holders=examples.clients,
        labels=examples.train["label"],
        columns=examples.columns,
    )
