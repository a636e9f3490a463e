"""What the first round starts from, where that is not all drawn: a trained head, or adapters from a folder."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_lora.adapters import layer_ranks, targets
from fedjax_lora.config.experiment import ExperimentConfig
from fedjax_lora.core.errors import ConfigWarning
from fedjax_lora.core.learning import Model
from fedjax_lora.core.types import Base
from fedjax_lora.data import tokens
from fedjax_lora.models import initial, load


class Begin(NamedTuple):
    """What the first round starts from, beside what is drawn: a task head, None for a new one; adapters, or None."""

    head: dict[str, Any] | None
    given: initial.Initial | None

    def hash_given(self) -> str:
        """SHA-256 of the adapters; empty for none."""
        given = self.given
        return "" if given is None else hash_weights((given.a, given.b, given.ranks), given.head)


def given_adapters(
    config: ExperimentConfig, model: Model, base: Base, class_names: Sequence[str]
) -> initial.Initial | None:
    """The adapters of `lora.initial`; warns where they are of a model by another name, or their head is not taken.

    Raises:
      ValueError: the folder does not fit the model; one line.
    """
    lora, of = config.lora, config.model
    if lora.initial is None:
        return None
    assert isinstance(of, load.ModelConfig) and of.pretrained is not None  # as ExperimentConfig demands
    found = load.read_pretrained(of, of.pretrained)
    head = jax.eval_shape(model.init_head, jax.random.key(0))
    wanted = initial.Wanted(
        sites=model.sites,
        targets=tuple(targets.choose(lora.targets, model.sites, model.num_layers)),
        num_layers=model.num_layers,
        head={name: leaf.shape for name, leaf in head.items()},
        labels=column_labels(config, class_names),
        pooling=of.pooling,
        pooler="pooler" in base,
        head_class=found.family.head_class(config.task.name, found.shape),
        weights_hash=layers_hash(of, base),
    )
    given = initial.read(lora.initial, wanted)
    layers = layer_ranks.resolve(lora, {name: model.sites[name] for name in wanted.targets}, model.num_layers)
    for name, ranks in given.ranks.items():
        own = layers.ranks[name] if layers is not None and layers.ranks else np.full(model.num_layers, lora.rank)
        if (ranks > own).any():
            layer = int(np.argmax(ranks > own))
            where = f" in layer {layer} of {name}" if layers is not None else ""
            raise ValueError(
                f"lora.rank must be at least {ranks.max()}, the rank of {lora.initial}{where}, got {own[layer]:.0f}"
            )
    names = [os.path.basename(os.path.normpath(name)) for name in (given.base_model, of.pretrained)]
    if given.base_model and names[0] != names[1]:
        warnings.warn(
            f"lora.initial {lora.initial} is of the model {given.base_model}, and model.pretrained is {of.pretrained}",
            ConfigWarning,
            stacklevel=4,
        )
    if given.lacks:
        warnings.warn(f"the task head is a new one: of lora.initial, {given.lacks}", ConfigWarning, stacklevel=4)
    return given


def column_labels(config: ExperimentConfig, class_names: Sequence[str]) -> tuple[str, ...]:
    """The label of each column of the task's head; () where columns have none, as one number has."""
    return tuple(class_names) if getattr(config.task, "learns", "label") in ("label", "token_label") else ()


def hash_weights(base: Base, head: dict | None = None) -> str:
    """SHA-256 of what a run starts from: the frozen weights, and the task head where there is one."""
    leaves = jax.tree_util.tree_leaves_with_path((base, head))
    return tokens.digest({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def layers_hash(model: load.ModelConfig, base: Base) -> str:
    """SHA-256 of the frozen weights of a pretrained model's layers in float32, by which adapters know their model."""
    if model.compute_dtype != "float32":
        exact = dataclasses.replace(model, compute_dtype="float32", activation_dtype="float32")
        base = load.read_pretrained(exact, str(model.pretrained)).weights()
    return hash_weights(base["layers"])
