"""RoBERTa (Liu et al., arXiv 1907.11692), XLM-RoBERTa and CamemBERT: BERT but for how positions are counted.

Adapters may sit where BERT's do.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Hidden, Model, Places, Task
from fedjax_lora.core.types import Base, Batch
from fedjax_lora.models import bert, layers
from fedjax_lora.models.family import Family, read_shape, refuse, token_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(bert.BertConfig):
    """Shape of a RoBERTa encoder; the defaults are those of Hugging Face.

    first_position: row of the table of positions that the first token takes; the row before it is of padding, and its
      number is the token of padding.
    """

    vocab_size: int = 50265
    first_position: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.max_positions <= self.first_position:
            raise ValueError(f"max_positions must be above {self.first_position}, got {self.max_positions}")


def shape(fields: Mapping[str, Any], **ours: Any) -> RobertaConfig:
    """RobertaConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant that this encoder does not compute; names the field as `config.json` does.
    """
    refuse(
        fields,
        {"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)},
    )
    padding = fields.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise ValueError(f"pad_token_id must be an integer of at least 0, got {padding!r}")
    return read_shape(RobertaConfig, fields, bert.NAMES, first_position=padding + 1, **ours)


def roberta(config: RobertaConfig, task: Task, adapter: Adapter) -> Model:
    """A RoBERTa encoder with the head of a task on top; a batch holds what BERT's does.

    Args:
      config: shape of the encoder.
      task: what is read of the positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    return bert.bert(config, task, adapter)._replace(embed=partial(embed, config))


def embed(config: RobertaConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words, positions and types, normalised."""
    ids, places = batch["input_ids"], layers.places_of(batch)
    if places is None:
        layers.check_length(config.max_positions - config.first_position, ids.shape[1])
    return bert.embed_at(config, base, batch, _positions(config.first_position - 1, ids, places), key)


def _positions(padding: int, ids: Array, places: Places | None) -> Array:
    """`[G, P]` rows of the table of positions: tokens other than padding are counted in each example, from 1 on."""
    real = (ids != padding).astype(jnp.int32)
    if places is None:
        return padding + real * jnp.cumsum(real, axis=1)
    count = jnp.cumsum(real)  # through all rows, in which an example lies whole
    before = (count - real.ravel())[places.first]
    return padding + real * (count.reshape(ids.shape) - before.at[places.example].get(mode="clip"))


def family(title: str, tokens: str, vocab_size: int = RobertaConfig.vocab_size) -> Family:
    """RoBERTa under another name.

    Args:
      title: its name.
      tokens: its class of transformers for the labels of tokens.
      vocab_size: where `config.json` says nothing.
    """

    def own_shape(fields: Mapping[str, Any], **ours: Any) -> RobertaConfig:
        return shape({"vocab_size": vocab_size, **fields}, **ours)

    classes = token_class(tokens, "classifier", "roberta.")
    return bert.FAMILY._replace(title=title, shape=own_shape, make=roberta, prefixes=("", "roberta."), classes=classes)


FAMILY = family("RoBERTa", "RobertaForTokenClassification")
XLM = family("XLM-RoBERTa", "XLMRobertaForTokenClassification", vocab_size=30522)
CAMEMBERT = family("CamemBERT", "CamembertForTokenClassification", vocab_size=30522)
