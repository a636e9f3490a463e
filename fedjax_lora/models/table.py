"""A model's table of frozen weights: shape, logical axes, initialiser, place in a checkpoint and adapter sites of each.

A table maps the path of a leaf in the base, its keys joined by `/`, to a Row. Rows under `layers/` are of one layer;
the base stacks them to `[L, ...]`. All else that is known of the weights follows from the table: random weights, their
shapes, where adapters may sit, and where each lies in a Hugging Face checkpoint.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from fedjax_lora.core.learning import Site
from fedjax_lora.core.types import Base

LAYERS = "layers"
"""What the paths of the rows of one layer begin with."""

Init = Callable[[Array, Sequence[int], Any], Array]
"""`(key, shape, dtype) -> weights`."""


class Stored(NamedTuple):
    """How a tensor of a checkpoint becomes columns of ours, and back: NumPy arrays.

    read: from the checkpoint's. write: to it.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


AS_IS = Stored(lambda tensor: tensor, lambda leaf: leaf)
TRANSPOSED = Stored(np.transpose, np.transpose)
"""Of PyTorch's linear layers, which hold `[n_out, n_in]`."""


class Row(NamedTuple):
    """One frozen weight.

    shape: without the axis of layers.
    axes: logical name of each axis: `vocab`, `position`, `embed`, `heads`, `mlp`; None for one that is never sharded.
    init: of random weights.
    names: of its tensors in a Hugging Face checkpoint, with `{layer}` under `layers/`; several lie side by side along
      the last axis.
    stored: how each of them is stored.
    sites: name of the adapter site that each of the tensors is; () for none.
    columns: of each tensor; () where there is one.
    roles: of each site, see `Site.roles`.
    matrix: whether it is held in the dtype that products multiply in, else in float32.
    prefixed: whether what stands before the names of a checkpoint stands before these too; it does not before the
      head of a language model.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    names: tuple[str, ...] = ()
    stored: Stored = AS_IS
    sites: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    roles: tuple[tuple[str, ...], ...] = ()
    matrix: bool = False
    prefixed: bool = True


Table = Mapping[str, Row]


def normal(scale: float) -> Init:
    """Normal weights of this deviation."""
    return lambda key, shape, dtype: (scale * jax.random.normal(key, shape)).astype(dtype)


lecun: Init = jax.nn.initializers.lecun_normal()
zeros: Init = jax.nn.initializers.zeros
ones: Init = jax.nn.initializers.ones


class Part(NamedTuple):
    """One of the projections that lie side by side in a matrix.

    site: name of the adapter site. source: module of the checkpoint. n_out: its columns. roles: see `Site.roles`.
    """

    site: str
    source: str
    n_out: int
    roles: tuple[str, ...] = ()


def dense(
    path: str,
    n_in: int,
    parts: Sequence[Part],
    axes: tuple[str | None, str | None],
    *,
    bias: bool = True,
    stored: Stored = TRANSPOSED,
    init: Init = lecun,
) -> dict[str, Row]:
    """Rows of `w: [n_in, columns]`, and of `b: [columns]` where there is a bias, of projections side by side."""
    columns = tuple(part.n_out for part in parts)
    names, sites = [part.source for part in parts], tuple(part.site for part in parts if part.site)
    weight = tuple(f"{name}.weight" for name in names)
    roles = tuple(part.roles for part in parts)
    rows = {f"{path}/w": Row((n_in, sum(columns)), axes, init, weight, stored, sites, columns, roles, matrix=True)}
    if bias:
        tensors = tuple(f"{name}.bias" for name in names)
        rows[f"{path}/b"] = Row((sum(columns),), axes[1:], zeros, tensors, columns=columns)
    return rows


def norm(path: str, source: str, d: int, *, bias: bool = True) -> dict[str, Row]:
    """Rows of a normalisation: `scale`, and `bias` where it has one, `[d]` each."""
    rows = {f"{path}/scale": Row((d,), ("embed",), ones, (f"{source}.weight",))}
    return rows | ({f"{path}/bias": Row((d,), ("embed",), zeros, (f"{source}.bias",))} if bias else {})


def embedding(source: str, rows: int, d: int, axis: str | None, *, matrix: bool = False) -> Row:
    """A table of vectors, `[rows, d]`."""
    return Row((rows, d), (axis, "embed"), normal(0.02), (f"{source}.weight",), matrix=matrix)


def sites(table: Table) -> dict[str, Site]:
    """Where adapters may sit: `Model.sites`."""
    found = {}
    for path, row in table.items():
        first = 0
        for name, site, n_out, roles in zip(row.names, row.sites, row.columns, row.roles, strict=False):
            group = path.split("/")[1]
            found[site] = Site(group, first, row.shape[0], n_out, name.removesuffix(".weight"), roles)
            first += n_out
    return found


def input_first(table: Table) -> set[str]:
    """Names of the sites whose matrix a checkpoint holds as `[n_in, n_out]`, as we do and transformers' Conv1D does."""
    return {site for row in table.values() for site in row.sites if row.stored is AS_IS}


def shapes(table: Table, num_layers: int, dtype: str) -> Base:
    """The base's shapes and dtypes; `dtype` is that of the matrices."""

    def shape(path: str, row: Row) -> jax.ShapeDtypeStruct:
        stacked = (num_layers, *row.shape) if in_layers(path) else row.shape
        return jax.ShapeDtypeStruct(stacked, dtype if row.matrix else jnp.float32)

    return unflatten_dict({path: shape(path, row) for path, row in table.items()}, sep="/")


def axes(table: Table) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of the base's leaves: `Model.axes`."""
    return {path: (None, *row.axes) if in_layers(path) else row.axes for path, row in table.items()}


def init(table: Table, key: Array, num_layers: int, dtype: str, first: Sequence[str] = ()) -> Base:
    """Random frozen weights.

    Args:
      table: of the model.
      key: consumed.
      num_layers: L.
      dtype: of the matrices.
      first: paths of the rows that are given the first keys, in this order, whether or not the table has them; their
        weights do not depend on the others. `layers` stands for all layers.
    """
    others = [path for path in table if not in_layers(path) and path not in first]
    order = dict.fromkeys([*first, LAYERS, *others])
    keys = dict(zip(order, jax.random.split(key, len(order)), strict=True))

    def of_layer(layer_key: Array) -> dict[str, Array]:
        rows = {path: row for path, row in table.items() if in_layers(path)}
        return {path: _draw(row, _own_key(layer_key, path), dtype) for path, row in rows.items()}

    drawn = {path: _draw(row, keys[path], dtype) for path, row in table.items() if not in_layers(path)}
    drawn |= jax.vmap(of_layer)(jax.random.split(keys[LAYERS], num_layers))
    return unflatten_dict(drawn, sep="/")


def tensors(table: Table, base: Base) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, float32 or in the dtype of the matrices, from frozen weights."""
    found = {}
    for path, leaf in flatten_dict(base, sep="/").items():
        row = table[path]
        layers = np.asarray(leaf) if in_layers(path) else np.asarray(leaf)[None]
        cuts = np.cumsum(row.columns)[:-1]
        for layer, whole in enumerate(layers):
            for name, part in zip(row.names, np.split(whole, cuts, axis=-1), strict=True):
                found[name.format(layer=layer)] = np.ascontiguousarray(row.stored.write(part))
    return found


def in_layers(path: str) -> bool:
    """Whether a row is of one layer."""
    return path.startswith(f"{LAYERS}/")


def _draw(row: Row, key: Array, dtype: str) -> Array:
    return row.init(key, row.shape, jnp.dtype(dtype if row.matrix else jnp.float32))


def _own_key(key: Array, path: str) -> Array:
    """A key for the matrix of a group: Flax's rule for the first parameter of a module."""
    group = path.split("/")[1]
    digest = hashlib.sha1(group.encode() + b"\x01").digest()
    return jax.random.fold_in(key, jnp.uint32(int.from_bytes(digest[:4], "big")))
