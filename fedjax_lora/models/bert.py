"""Encoders of the BERT family (Devlin et al., arXiv 1810.04805), MiniLM and BERT checkpoints included.

Adapters may sit on `query`, `key`, `value`, `output` (attention.output.dense), `up` (intermediate.dense) and `down`
(output.dense).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Adapter, Hidden, Model, Places, Site, Task
from fedjax_lora.core.types import Adapters, Base, Batch
from fedjax_lora.models import layers
from fedjax_lora.models.safetensors import Weight
from fedjax_lora.ops.primitives import layer_norm, project

SOURCES = {
    "query": "encoder.layer.{layer}.attention.self.query",
    "key": "encoder.layer.{layer}.attention.self.key",
    "value": "encoder.layer.{layer}.attention.self.value",
    "output": "encoder.layer.{layer}.attention.output.dense",
    "up": "encoder.layer.{layer}.intermediate.dense",
    "down": "encoder.layer.{layer}.output.dense",
}
"""`Site.source` of each site: its name in a Hugging Face BertModel."""

RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Endings of checkpoints that were converted from TensorFlow, bert-base-uncased among them -> today's."""

PREFIXES = ("", "bert.")
"""What may stand before the names: nothing (BertModel) or `bert.` (a model with a head)."""

IGNORED = ("embeddings.position_ids", "pooler.*")
"""Tensors that an encoder may hold and the model does not need."""

POOLER = "pooler.dense.weight"
"""A checkpoint that holds it has a pretrained pooler."""


_MOST, _MOST_LAYERS = 2**24, 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape of a BERT encoder; the defaults are those of Hugging Face.

    pooler: whether `cls` pooling passes through the pretrained tanh layer.
    dropout: rate after the embeddings and on the output of each residual branch.
    compute_dtype: of the frozen matrices and their products.
    """

    vocab_size: int = 30522
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    num_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooling: Literal["mean", "cls"] = "mean"
    pooler: bool = False
    dropout: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "max_positions", "num_types"):
            value, most = getattr(self, name), _MOST_LAYERS if name == "num_layers" else _MOST
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width = {self.width}, got {self.num_heads}")
        if not isinstance(self.activation, str) or self.activation not in layers.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(layers.ACTIVATIONS)}, got {self.activation!r}")
        if type(self.norm_eps) is not float or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number above 0 and below 1, got {self.norm_eps!r}")


def read_config(fields: Mapping[str, Any], **ours: Any) -> BertConfig:
    """BertConfig from the fields of a Hugging Face `config.json` and our own options.

    Raises:
      ValueError: for a variant of BERT that this encoder does not compute; names the field as `config.json` does.
    """
    if (kind := fields.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    if (decodes := fields.get("is_decoder")) not in (None, False):
        raise ValueError(f"is_decoder must be false, got {decodes!r}")
    names = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "num_types": "type_vocab_size",
        "activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
    }
    try:
        return BertConfig(**{name: fields[theirs] for name, theirs in names.items() if theirs in fields}, **ours)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise ValueError(f"{names.get(name, name)} {problem}") from None


def sites(config: BertConfig) -> dict[str, Site]:
    """Where adapters may sit, and where these matrices lie in a checkpoint."""
    return layers.block_sites(config.width, config.mlp_width, SOURCES)


def weight_map(config: BertConfig) -> dict[str, Weight]:
    """Where each frozen weight lies in a Hugging Face checkpoint; several sites of one matrix lie side by side."""
    groups: dict[str, list[Site]] = {}
    for site in sites(config).values():
        groups.setdefault(site.group, []).append(site)
    weights = {
        "embeddings/word": Weight(("embeddings.word_embeddings.weight",)),
        "embeddings/position": Weight(("embeddings.position_embeddings.weight",)),
        "embeddings/type": Weight(("embeddings.token_type_embeddings.weight",)),
        **_norm("embeddings/norm", "embeddings.LayerNorm"),
        **_norm("layers/norm_attention", "encoder.layer.{layer}.attention.output.LayerNorm"),
        **_norm("layers/norm_mlp", "encoder.layer.{layer}.output.LayerNorm"),
    }
    for group, side_by_side in groups.items():
        in_order = sorted(side_by_side, key=lambda site: site.first)
        weights |= _dense(f"layers/{group}", *(site.source for site in in_order))
    if config.pooler:
        weights |= _dense("pooler", "pooler.dense")
    return weights


def _dense(path: str, *names: str) -> dict[str, Weight]:
    return {
        f"{path}/w": Weight(tuple(f"{name}.weight" for name in names), transpose=True),
        f"{path}/b": Weight(tuple(f"{name}.bias" for name in names)),
    }


def _norm(path: str, name: str) -> dict[str, Weight]:
    return {f"{path}/scale": Weight((f"{name}.weight",)), f"{path}/bias": Weight((f"{name}.bias",))}


def bert(config: BertConfig, task: Task, adapter: Adapter) -> Model:
    """A BERT encoder with the head of a task on top.

    A batch holds `input_ids: [B, S]` and `attention_mask: [B, S]`, and `token_type_ids: [B, S]` where the types
    are not all 0; or all of them packed, see `data.packing`.

    Args:
      config: shape of the encoder.
      task: what is read of the pooled positions, by the trained head.
      adapter: what is trained beside the frozen matrices.
    """
    block = _block(config, adapter.project)
    return Model(
        init=partial(init, config),
        init_head=lambda key: task.head(key, config.width),
        embed=partial(embed, config),
        layers=partial(encode, block),
        task=lambda base, adapters, hidden, key: task.read(adapters.head, pooled(config, base, hidden)),
        sites=sites(config),
        num_layers=config.num_layers,
        packs=True,
    )


def init(config: BertConfig, key: Array) -> Base:
    """Random frozen weights."""
    word_key, position_key, type_key, layers_key, pooler_key = jax.random.split(key, 5)
    d = config.width

    def table(table_key: Array, rows: int) -> Array:
        return 0.02 * jax.random.normal(table_key, (rows, d))

    base = {
        "embeddings": {
            "word": table(word_key, config.vocab_size),
            "position": table(position_key, config.max_positions),
            "type": table(type_key, config.num_types),
            "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
        },
        "layers": layers.init_blocks(_block(config), layers_key, config.num_layers, d),
    }
    if config.pooler:
        base["pooler"] = {"w": table(pooler_key, d).astype(config.compute_dtype), "b": jnp.zeros(d)}
    return base


def embed(config: BertConfig, base: Base, batch: Batch, key: Array | None) -> Hidden:
    """Words, positions and types, normalised."""
    ids, tables, places = batch["input_ids"], base["embeddings"], places_of(batch)
    if places is None:
        check_length(config, ids.shape[1])
    positions = tables["position"][: ids.shape[1]] if places is None else tables["position"][places.position]
    types = batch["token_type_ids"] if "token_type_ids" in batch else jnp.zeros_like(ids)
    values = tables["word"][ids] + tables["type"][types] + positions
    values = layer_norm(values, (tables["norm"]["scale"], tables["norm"]["bias"]), config.norm_eps)
    values = layers.dropout(values, config.dropout, None if key is None else jax.random.fold_in(key, 0), places)
    return Hidden(values=values, mask=batch["attention_mask"].astype(jnp.float32), places=places)


def places_of(batch: Batch) -> Places | None:
    """Where the positions of a packed batch lie; None of a batch that is not."""
    if "example_ids" not in batch:
        return None
    return Places(batch["example_ids"], batch["position_ids"], batch["first_places"])


def check_length(config: BertConfig, max_length: int) -> None:
    """Raise ValueError for a sequence that is longer than the model's table of positions."""
    if max_length > config.max_positions:
        raise ValueError(
            f"data.max_length must be at most {config.max_positions}, the model's positions, got {max_length}"
        )


def encode(block: layers.Block, base: Base, adapters: Adapters, hidden: Hidden, key: Array | None) -> Hidden:
    """All blocks."""
    layers_key = None if key is None else jax.random.fold_in(key, 1)
    return layers.run_blocks(block, base["layers"], adapters.modules, hidden, layers_key)


def pooled(config: BertConfig, base: Base, hidden: Hidden) -> Array:
    """`[B, d]`: the pooled positions, through the pretrained pooler where the model has one."""
    values = layers.pool(hidden, config.pooling)
    return jnp.tanh(project(values, base["pooler"]["w"]) + base["pooler"]["b"]) if config.pooler else values


def _block(config: BertConfig, project: layers.Project = layers.without_adapters) -> layers.Block:
    return layers.Block(
        sites=sites(config),
        project=project,
        num_heads=config.num_heads,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=False,
        dropout=config.dropout,
        dtype=config.compute_dtype,
    )
